"""Other tools. Models that they saved become versions: ``files.py`` reads them, ``importing.py``
finds out what they are, ``command.py`` is ``flserving import``. Flower has its own,
``flserving.federated.flower``. ``ray.py`` runs several servers on Ray Serve. ``kubernetes.yaml``
and ``kserve.yaml`` run the image of the repository's Dockerfile.

Nothing here runs code from a file: no pickle is opened but by torch's reader of weights only.
"""
