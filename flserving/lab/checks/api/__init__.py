"""Notebooks 05 and 06: messages, retries, and where the time of a call goes."""
