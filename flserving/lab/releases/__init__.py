"""A new version on its way to its users.

``disk.py`` loses power while it is published, ``rollout.py`` watches who answers while an alias
moves, ``trials.py`` plans an A/B test and plays its users.
"""
