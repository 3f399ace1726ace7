"""Notebooks as pages that need no kernel and no network: ``book.py``, ``slides.py``; ``formula.py``
draws the TeX."""
