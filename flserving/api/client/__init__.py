"""How another process asks a server: ``client.py`` over REST or gRPC, with the retries of ``retries.py``."""

from flserving.api.client.client import AsyncClient, Client
from flserving.api.client.retries import Retries

__all__ = ["AsyncClient", "Client", "Retries"]
