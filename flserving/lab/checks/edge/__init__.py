"""Notebooks 07 and 08: the device's policy and updates, and heads of one client each."""
