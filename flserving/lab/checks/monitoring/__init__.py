"""Notebook 11: counters, quantiles, alerts."""
