"""flserving: serve models that were trained by federated learning, and see how serving works.

The names below are the whole public surface; everything else is imported from its room (``flserving.registry``,
``flserving.federated``...).
"""

from flserving.api import serve
from flserving.edge import EdgeModelServer
from flserving.errors import FlservingError
from flserving.models.processing import Postprocessor, Preprocessor
from flserving.registry import Registry
from flserving.serving.cache import ModelCache, PredictionCache
from flserving.serving.config import ServingConfig
from flserving.serving.engine import InferenceEngine
from flserving.serving.personalized import PersonalizedServer
from flserving.serving.server import ModelServer, create_serving_pipeline, demo_serving

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
