"""Experiments on the clients of a federation.

``attacks.py``: which check of the gate notices a bad round; ``membership.py``: what answers betray
of the data that a model was trained on; ``who_gains.py``: which clients gain from a head of their
own.
"""
