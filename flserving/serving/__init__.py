"""A request becomes a prediction: loader, model cache, preprocessor, inference engine,
postprocessor, model server.

Read ``loader.py``, ``cache.py``, ``engine.py``, ``batching/policy.py`` and ``server.py``, in that
order: each is one box of the picture in README. The preprocessor and the postprocessor belong to a
version: see ``models/processing.py``. ``request.py`` is what goes through the steps of
``server.py``, ``router.py`` leads names to versions, ``repository.py`` holds what is loaded.
``personalized.py`` is for notebook 08; ``synonyms.py`` lets ``version_id`` stand for ``version``.
"""

from flserving.models.processing import Postprocessor, Preprocessor
from flserving.serving.cache import ModelCache, PredictionCache
from flserving.serving.config import ServingConfig
from flserving.serving.engine import InferenceEngine
from flserving.serving.personalized import PersonalizedServer
from flserving.serving.server import ModelServer, create_serving_pipeline, demo_serving

__all__ = [
    "InferenceEngine",
    "ModelCache",
    "ModelServer",
    "PersonalizedServer",
    "Postprocessor",
    "PredictionCache",
    "Preprocessor",
    "ServingConfig",
    "create_serving_pipeline",
    "demo_serving",
]
