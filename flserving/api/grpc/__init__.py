"""gRPC: ``codec.py`` reads and writes its messages, ``service.py`` has the methods, ``server.py``
the limits.

The messages come from ``descriptors.binpb``, which ``protoc`` made of the protocol's ``.proto``
files.
"""
