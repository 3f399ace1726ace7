"""flserving: serve models that were trained by federated learning, and see how serving works.

The names below are the whole public surface; everything else is imported from its room (``flserving.registry``,
``flserving.federated``...).
"""

from flserving.api import serve
from flserving.cache import ModelCache, PredictionCache
from flserving.config import ServingConfig
from flserving.edge import EdgeModelServer
from flserving.engine import InferenceEngine
from flserving.errors import FlservingError
from flserving.personalized import PersonalizedServer
from flserving.pipeline import create_serving_pipeline, demo_serving
from flserving.registry import Registry
from flserving.server import ModelServer
from flserving.transforms import Postprocessor, Preprocessor

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
    "create_serving_pipeline",
    "demo_serving",
    "serve",
]
