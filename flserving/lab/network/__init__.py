"""Between the caller and the model: what a network adds, and where a model should stand.

``link.py`` says how long a message takes, ``proxy.py`` makes a connection take that long,
``wire.py`` counts the bytes. Device, cloud or both: ``three_ways.py`` in virtual time,
``real_ways.py`` with real servers.
"""
