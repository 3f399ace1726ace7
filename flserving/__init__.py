"""flserving: serve models that were trained by federated learning, and see how serving works.

The names below are the whole public surface; everything else is imported from its room
(``flserving.registry``, ``flserving.federated``...). They, and the rooms, are loaded when they are
first used: torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flserving.api import asgi, serve
    from flserving.edge import EdgeModelServer
    from flserving.errors import FlservingError
    from flserving.models.processing import Postprocessor, Preprocessor
    from flserving.registry import Registry
    from flserving.serving.cache import ModelCache, PredictionCache
    from flserving.serving.config import ServingConfig
    from flserving.serving.engine import InferenceEngine
    from flserving.serving.personalized import PersonalizedServer
    from flserving.serving.server import ModelServer, create_serving_pipeline, demo_serving

    __version__: str

__all__ = [
    "EdgeModelServer",
    "FlservingError",
    "InferenceEngine",
    "ModelCache",
    "ModelServer",
    "PersonalizedServer",
    "Postprocessor",
    "PredictionCache",
    "Preprocessor",
    "Registry",
    "ServingConfig",
    "asgi",
    "create_serving_pipeline",
    "demo_serving",
    "serve",
]
_ROOMS = {
    "EdgeModelServer": "edge",
    "FlservingError": "errors",
    "Registry": "registry",
    "asgi": "api",
    "serve": "api",
}

if not TYPE_CHECKING:  # a type checker must see that a misspelt name is none

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib import metadata

            return metadata.version(__name__)
        if name in __all__:
            room = import_module(f"{__name__}.{_ROOMS.get(name, 'serving')}")
            return globals().setdefault(name, getattr(room, name))
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "__version__"})
