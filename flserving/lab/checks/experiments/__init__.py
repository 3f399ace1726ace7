"""Notebook 10: who gets which version, and when one is better."""
