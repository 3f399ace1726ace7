"""What optimised versions are worth here: measured side by side with the version they were made
from."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import flserving
from flserving.errors import NotSupportedError
from flserving.extras import need
from flserving.federated.data import Client
from flserving.lab.workbook.sentences import SentenceError
from flserving.models import weights
from flserving.registry import Registry
from flserving.registry.manifest import Lineage
from flserving.serving.config import ServingConfig
from flserving.serving.engine import InferenceEngine
from flserving.serving.loader import RegistrySource, load_engine

if TYPE_CHECKING:
    import pandas as pd

BATCHES = (1, 32)
_PEAK = """
import sys, numpy as np
from flserving import Registry, ServingConfig
from flserving.serving.loader import RegistrySource, load_engine
root, name, version, onnx = sys.argv[1:]
import torch, flserving.models.modules
if onnx: import onnx, onnxruntime
def kb(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
with Registry(root) as registry:
    before = kb("VmRSS")
    with open("/proc/self/clear_refs", "w") as file: file.write("5")
    engine = load_engine(RegistrySource(registry, name), version, ServingConfig())
    engine.execute([np.zeros((32, engine.preprocessor.num_features), np.float32)])
    print((kb("VmHWM") - before) / 1024)
"""


def need_onnx() -> None:
    """Stop a notebook with one message where a package of the extra onnx is missing.

    Raises:
        SentenceError: What to install.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            need(package, "onnx")
        except NotSupportedError:
            raise SentenceError(
                f"This notebook needs the extra onnx: {package} is not installed.\n"
                'Run   %pip install "onnx>=1.18" "onnxruntime>=1.22" "onnxscript>=0.5"   in a cell of its own\n'
                '(or `python -m pip install -e ".[onnx]"` in the course\'s folder), then run this cell again.'
            ) from None


class Speed(NamedTuple):
    """Microseconds of one call at a batch size, and how many times faster than the original:
    quartiles of the turns."""

    p50_us: float
    p99_us: float
    low: float
    times: float
    high: float


def race(
    original: InferenceEngine,
    others: Mapping[str, InferenceEngine],
    batch: int,
    turns: int = 30,
    each: int = 20,
) -> dict[str, Speed]:
    """Time engines in turns on the same rows: other load on the machine hits all of them. "" is the
    original.

    A call is ``execute``: preprocessing, the model, postprocessing. A turn's ratio is that of its
    medians.
    """
    rng = np.random.default_rng(0)
    engines = {"": original, **others}
    rows = rng.standard_normal((batch, original.preprocessor.num_features or 1), dtype=np.float32)
    taken = {key: np.empty((turns, each)) for key in engines}
    for turn in range(-2, turns):  # two to warm up, written over
        for key in rng.permutation(list(engines)):
            for call in range(each):
                began = time.perf_counter()
                engines[key].execute([rows])
                taken[key][max(turn, 0), call] = time.perf_counter() - began
    base = np.median(taken[""], axis=1)
    speeds = {}
    for key, seconds in taken.items():
        times = base / np.median(seconds, axis=1)
        calls_us = np.percentile(seconds * 1e6, [50, 99])
        speeds[key] = Speed(*calls_us, *np.percentile(times, [25, 50, 75]))
    return speeds


def peak_mb(registry: Registry, name: str, version: int) -> float:
    """Growth of a fresh process' resident memory, at its peak, from before it loads a version to
    after a batch of 32.

    Both runtimes are imported before. Pages, not objects: good to about 1 MB. NaN where /proc does
    not tell (not Linux), and for an architecture that only this process knows. Cost: about 3 s.
    """
    onnx = "onnx" if registry.manifest(name, version).architecture == "onnx" else ""
    command = [sys.executable, "-c", _PEAK, registry.root, name, str(version), onnx]
    path = {**os.environ, "PYTHONPATH": str(Path(flserving.__file__).parents[1])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=path, check=False
    )
    if done.returncode != 0:
        return math.nan
    return float(done.stdout)


def original_of(registry: Registry, name: str, version: int) -> int:
    """The version that a chain of optimisations started from."""
    while True:
        lineage = registry.manifest(name, version).lineage or Lineage()
        if not lineage.extra.get("optimisation"):
            return version
        assert lineage.parent_version is not None
        version = lineage.parent_version


def answers(engine: InferenceEngine, client: Client) -> NDArray[np.int64]:
    """The classes of a client's held-out rows, by its own head where the version has one for it."""
    rows = engine.preprocessor.validate(client.test_x)
    if engine.personal is not None:
        slots, found = engine.personal.choose(client.id, len(rows))
        if found == "own":
            (prediction,) = engine.personal.execute([(rows, slots)])
            return prediction.arrays()["predictions"]
    (prediction,) = engine.execute([rows])
    return prediction.arrays()["predictions"]


def report(
    registry: Registry,
    name: str,
    versions: Sequence[int],
    clients: Sequence[Client],
    *,
    memory: bool | Sequence[int] = True,
    turns: int = 30,
    each: int = 20,
) -> "pd.DataFrame":
    """One row per version, each against the original that it was made from.

    Columns: ``optimisation``, ``backend``, ``original``; ``file_kb``, ``compressed_kb`` (zstd,
    level 9), ``peak_mb`` (:func:`peak_mb`; where ``memory`` is a list, of these versions); for
    batches of 1 and 32 ``b1_p50_us``, ``b1_p99_us``, ``b1_times`` faster with its quartiles
    ``b1_low``, ``b1_high`` (:func:`race`); on the clients' held-out rows ``accuracy``,
    ``worst_client``, their changes ``points`` and ``worst_points``, and ``agreement`` with the
    original, each client answered as a server would (:func:`answers`); and ``noise_points``, two
    standard errors of ``points``: 2 sqrt(rows on which only one of both is right) / rows.

    Cost: about 2 s a version for the memory, and 2 (turns + 2) each calls of every version.
    """
    import pandas as pd
    import zstandard

    source = RegistrySource(registry, name)
    config = ServingConfig()
    origins = {version: original_of(registry, name, version) for version in versions}
    engines = {it: load_engine(source, str(it), config) for it in {*versions, *origins.values()}}
    hits = {it: [answers(engine, client) for client in clients] for it, engine in engines.items()}
    labels = [client.test_y for client in clients]
    table: dict[int, dict[str, Any]] = {}
    wanted = list(memory or ()) if memory is not True else list(engines)
    with ThreadPoolExecutor(2) as beside:  # processes that start; what is timed comes after them
        peaks = dict(
            zip(wanted, beside.map(lambda it: peak_mb(registry, name, it), wanted), strict=True)
        )
    for it in [*engines]:
        artifact = registry.read(name, it)
        image = weights.pack(artifact.arrays)
        compressed = zstandard.ZstdCompressor(level=9).compress(image)
        lineage = artifact.manifest.lineage or Lineage()
        right = [answer == label for answer, label in zip(hits[it], labels, strict=True)]
        table[it] = {
            "optimisation": lineage.extra.get("optimisation", ""),
            "backend": "onnx" if artifact.manifest.architecture == "onnx" else "torch",
            "original": origins.get(it, it),
            "file_kb": len(image) / 1e3,
            "compressed_kb": len(compressed) / 1e3,
            "peak_mb": peaks.get(it, math.nan),
            "accuracy": float(np.concatenate(right).mean()),
            "worst_client": min(float(part.mean()) for part in right),
        }
    for origin in set(origins.values()):
        others = {str(it): engines[it] for it in versions if origins[it] == origin and it != origin}
        for batch in BATCHES:
            for key, speed in race(engines[origin], others, batch, turns, each).items():
                row = table[int(key or origin)]
                row |= {f"b{batch}_{field}": value for field, value in speed._asdict().items()}
    whole = {it: np.concatenate(answers) for it, answers in hits.items()}
    truth = np.concatenate(labels)
    for it in versions:
        row = table[it]
        original = table[origins[it]]
        base = whole[origins[it]]
        own = whole[it]
        row["agreement"] = float((base == own).mean())
        row["points"] = 100 * (row["accuracy"] - original["accuracy"])
        row["worst_points"] = 100 * (row["worst_client"] - original["worst_client"])
        differ = (base == truth) != (own == truth)
        row["noise_points"] = 200 * math.sqrt(differ.sum()) / len(truth)
    return pd.DataFrame([table[it] for it in versions], index=pd.Index(versions, name="version"))
