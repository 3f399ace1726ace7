"""Notebook 09: fewer bits, fewer weights, and a proof."""
