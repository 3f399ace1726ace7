"""Notebook 01: averages, versions, promotion."""
