"""Queueing without a server: random requests, closed forms, virtual time.

``arrivals.py`` draws when requests come and what they ask for; ``theory.py`` has what can be said
in a formula, for queues and caches; ``simulate.py`` (batches) and ``storm.py`` (retries) play the
rest.
"""
