"""How another process asks a server: ``client.py`` over the ways of ``transports.py``;
``retries.py``: when again."""

from flserving.api.client.client import AsyncClient, Client
from flserving.api.client.retries import Retries

__all__ = ["AsyncClient", "Client", "Retries"]
