"""Dynamic batching: ``policy.py`` says which requests run together, ``workers.py`` runs them and
wakes who waits."""
