"""Measuring real servers and real models.

Load: ``load.py`` sends requests, ``ledger.py`` counts them, ``report.py`` has latencies and rates,
``slo.py`` what an operator concludes. ``breakdown.py`` splits one request's time; ``caching.py``
replays requests on a cache. Models: ``roofline.py`` bounds their time, ``optimization.py`` races a
model's versions, ``sweep.py`` does so width by width.
"""
