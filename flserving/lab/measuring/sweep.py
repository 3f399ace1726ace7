"""Where each technique starts to pay: speed-up and size by the width of the model."""

import tempfile
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flserving import models
from flserving.errors import InvalidModelError
from flserving.lab.measuring.optimization import BATCHES, race
from flserving.models.onnx import OnnxModel
from flserving.optimize import methods
from flserving.registry import Registry
from flserving.serving.config import ServingConfig
from flserving.serving.engine import InferenceEngine
from flserving.serving.loader import RegistrySource, load_engine

if TYPE_CHECKING:
    import pandas as pd


def sweep(
    widths: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
    *,
    batches: Sequence[int] = BATCHES,
    compiled: bool = False,
    turns: int = 15,
    each: int = 10,
) -> "pd.DataFrame":
    """Speed-up and file size of every technique on an mlp 64-w-w-10, by width w and batch size.

    Weights are random: time does not depend on their values. ``pruned`` zeroes half of them,
    ``pruned, structured`` takes half of the neurons, ``distilled`` has a quarter of them. With
    ``compiled``, torch.compile too; see :func:`compiled_engine`.

    Returns:
        Columns ``width``, ``technique``, ``batch``, ``p50_us``, ``p99_us``, ``low``, ``times``,
        ``high``, ``smaller`` (the original's file size over its own).

    Cost: about 3 s a width, most of it for exports.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for width in widths:
        with tempfile.TemporaryDirectory() as folder, Registry(folder) as registry:
            made = _techniques(registry, width)
            source = RegistrySource(registry, "m")
            engines = {}
            sizes = {}
            for key, number in made.items():
                engines[key] = load_engine(source, str(number), ServingConfig())
                sizes[key] = registry.manifest("m", number).weights_nbytes
            if compiled:
                # it gives up after eight of one class, silently: later widths would run eager
                torch.compiler.reset()
                engines["compiled"] = compiled_engine(engines[""])
                sizes["compiled"] = sizes[""]
            original = engines.pop("")
            for batch in batches:
                for key, speed in race(original, engines, batch, turns, each).items():
                    what = {"width": width, "technique": key or "original", "batch": batch}
                    smaller = sizes[""] / sizes[key]
                    rows.append({**what, **speed._asdict(), "smaller": smaller})
    return pd.DataFrame(rows)


def compiled_engine(engine: InferenceEngine) -> InferenceEngine:
    """The same model through ``torch.compile``, compiled and warm. For this process only; the first
    takes a minute.

    Raises:
        InvalidModelError: It does not compile here: no C++ compiler, a model that is not torch's
            (``onnx``).
    """
    if isinstance(engine.model, OnnxModel):
        raise InvalidModelError(
            "an ONNX graph runs outside torch: there is nothing that torch.compile could compile"
        )
    try:
        with warnings.catch_warnings():
            # torch's own, at import
            warnings.filterwarnings("ignore", r".*torch\.jit\.script", DeprecationWarning)
            module: Any = torch.compile(engine.model, dynamic=True)
            made = InferenceEngine(
                module,
                engine.preprocessor,
                engine.postprocessor,
                version=f"{engine.version}, compiled",
                owned=True,
            )
            made.warmup()
    except Exception as error:  # whatever the compiler meets
        raise InvalidModelError(
            f"torch.compile does not work here: {str(error.__cause__ or error)[:300]}"
        ) from error
    return made


def _techniques(registry: Registry, width: int) -> dict[str, int]:
    """Publish an mlp of random weights and what the techniques make of it: technique -> version; ""
    is the original."""
    torch.manual_seed(0)

    def publish(hidden: int) -> int:
        parameters = {"sizes": [64, hidden, hidden, 10]}
        module = models.build("mlp", parameters)
        return registry.publish("m", module, architecture="mlp", parameters=parameters).version

    rng = np.random.default_rng(0)
    calibration = rng.standard_normal((256, 64), dtype=np.float32)
    made = {"": publish(width), "distilled": publish(max(1, width // 4))}
    made["pruned"] = methods.prune(registry, "m", 1, 0.5).version
    made["pruned, structured"] = methods.prune(registry, "m", 1, 0.5, structured=True).version
    made["onnx"] = methods.to_onnx(registry, "m", 1).version
    for method in methods.METHODS:
        data = calibration if method == "static" else None
        made[f"quantised, {method}"] = methods.quantise(
            registry, "m", made["onnx"], method, data
        ).version
    return made
