"""Notebooks 02 to 04: stages, caches, batches."""
