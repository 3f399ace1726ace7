"""gRPC by the Open Inference Protocol: the methods (``service.py``), messages <-> arrays (``codec.py``), the server."""
