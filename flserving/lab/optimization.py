"""What optimised versions are worth here: measured side by side with the version they were made from, and put in words.

Nothing in the words is known beforehand. They follow from the measurements, and would be others on another machine.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import flserving
from flserving import models, optimization, weights
from flserving.backends import OnnxModel
from flserving.config import ServingConfig
from flserving.datasets import Client
from flserving.engine import InferenceEngine
from flserving.errors import InvalidModelError
from flserving.loader import RegistrySource, load_engine
from flserving.manifest import Lineage
from flserving.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

CLAIMS: Mapping[str, tuple[float, float]] = {  # the tutorial's: how many times faster, and percentage points lost
    "quantised": (2, 1),
    "pruned": (2, 1),
    "distilled": (5, 2),
    "onnx": (2, 0),
}
BATCHES = (1, 32)
_MARGIN = 0.05  # a speed-up counts when the middle half of the turns lies this far from 1
_PEAK = """
import sys, numpy as np
from flserving import Registry, ServingConfig
from flserving.errors import InvalidModelError
from flserving.loader import RegistrySource, load_engine
root, name, version, onnx = sys.argv[1:]
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


class Speed(NamedTuple):
    """Microseconds of one call at a batch size, and how many times faster than the original: quartiles of the turns."""

    p50_us: float
    p99_us: float
    low: float
    times: float
    high: float


def race(
    original: InferenceEngine, others: Mapping[str, InferenceEngine], batch: int, turns: int = 30, each: int = 20
) -> dict[str, Speed]:
    """Time engines in turns on the same rows: other load on the machine hits all of them. "" is the original.

    A call is ``execute``: preprocessing, the model, postprocessing. A turn's ratio is that of its medians.
    """
    rng, engines = np.random.default_rng(0), {"": original, **others}
    rows = rng.standard_normal((batch, original.preprocessor.num_features or 1), dtype=np.float32)
    taken = {key: np.empty((turns, each)) for key in engines}
    for turn in range(-2, turns):  # two to warm up, written over
        for key in rng.permutation(list(engines)):
            for call in range(each):
                began = time.perf_counter()
                engines[key].execute([rows])
                taken[key][max(turn, 0), call] = time.perf_counter() - began
    base = np.median(taken[""], axis=1)
    return {
        key: Speed(*np.percentile(it * 1e6, [50, 99]), *np.percentile(base / np.median(it, axis=1), [25, 50, 75]))
        for key, it in taken.items()
    }


def peak_mb(registry: Registry, name: str, version: int) -> float:
    """Growth of a fresh process' resident memory, at its peak, from before it loads a version to after a batch of 32.

    Both runtimes are imported before. Pages, not objects: good to about 1 MB. NaN where /proc does not tell (not
    Linux), and for an architecture that only this process knows. Cost: about 3 s.
    """
    onnx = "onnx" if registry.manifest(name, version).architecture == "onnx" else ""
    command = [sys.executable, "-c", _PEAK, registry.root, name, str(version), onnx]
    path = {**os.environ, "PYTHONPATH": str(Path(flserving.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=path, check=False)
    return float(done.stdout) if done.returncode == 0 else math.nan


def original_of(registry: Registry, name: str, version: int) -> int:
    """The version that a chain of optimisations started from."""
    while (lineage := registry.manifest(name, version).lineage or Lineage()).extra.get("optimisation"):
        assert lineage.parent_version is not None
        version = lineage.parent_version
    return version


def report(
    registry: Registry, name: str, versions: Sequence[int], clients: Sequence[Client], *, memory: bool = True,
    turns: int = 30, each: int = 20,
) -> "pd.DataFrame":  # fmt: skip
    """One row per version, each against the original that it was made from.

    Columns: ``optimisation``, ``backend``, ``original``; ``file_kb``, ``compressed_kb`` (zstd, level 9), ``peak_mb``
    (:func:`peak_mb`); for batches of 1 and 32 ``b1_p50_us``, ``b1_p99_us``, ``b1_times`` faster with its quartiles
    ``b1_low``, ``b1_high`` (:func:`race`); on the clients' held-out rows ``accuracy``, ``worst_client`` and
    ``agreement`` with the original; and a ``verdict``.

    Cost: about 3 s a version for the memory, and 2 (turns + 2) each calls of every version.
    """
    import pandas as pd
    import zstandard

    source, config = RegistrySource(registry, name), ServingConfig()
    origins = {version: original_of(registry, name, version) for version in versions}
    engines = {it: load_engine(source, str(it), config) for it in {*versions, *origins.values()}}
    hits = {it: [np.array(e.predict(c.test_x)["predictions"]) for c in clients] for it, e in engines.items()}
    labels = [client.test_y for client in clients]
    table: dict[int, dict[str, Any]] = {}
    for it in [*engines]:
        artifact = registry.read(name, it)
        image = bytes(weights.as_bytes(weights.pack(artifact.tensors)))
        lineage = artifact.manifest.lineage or Lineage()
        right = [answer == label for answer, label in zip(hits[it], labels, strict=True)]
        table[it] = {
            "optimisation": lineage.extra.get("optimisation", ""),
            "backend": "onnx" if artifact.manifest.architecture == "onnx" else "torch",
            "original": origins.get(it, it),
            "file_kb": len(image) / 1e3,
            "compressed_kb": len(zstandard.ZstdCompressor(level=9).compress(image)) / 1e3,
            "peak_mb": peak_mb(registry, name, it) if memory else math.nan,
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
        base, own = whole[origins[it]], whole[it]
        table[it]["agreement"] = float((base == own).mean())
        differ = int(((base == truth) != (own == truth)).sum())
        table[it]["verdict"] = verdict(table[it], table[origins[it]], 2 * math.sqrt(differ) / len(truth))
    return pd.DataFrame([table[it] for it in versions], index=pd.Index(versions, name="version"))


def verdict(row: Mapping[str, Any], original: Mapping[str, Any], noise: float) -> str:
    """The measurements of one version in words.

    The time of a batch is taken as a fixed part (dispatch) and a part for each row, which two batch sizes tell apart.

    Args:
        noise: Two standard errors of the change in accuracy: 2 sqrt(rows on which only one of both is right) / rows.
    """
    if row["optimisation"] == "":
        return "the original"
    words = []
    for batch in BATCHES:
        low, times, high = (row[f"b{batch}_{field}"] for field in ("low", "times", "high"))
        way = "faster" if low > 1 + _MARGIN else "slower" if high < 1 - _MARGIN else "no faster"
        words.append(f"{way} at {batch} ({times:.2f} x)")
    (mine, step), (theirs, stride) = cost_us(row), cost_us(original)
    if row["b1_low"] <= 1 + _MARGIN:  # it does not pay for one row: why?
        if mine > step:
            words.append("dispatch costs more than the multiply")
        elif step >= stride:
            words.append("the multiply itself is no cheaper")
        if step < stride and mine > theirs:
            words.append(f"it would pay from about {math.ceil((mine - theirs) / (stride - step))} rows")
    file, packed = (original[key] / row[key] for key in ("file_kb", "compressed_kb"))
    words.append(f"file {file:.1f} x smaller" if file > 1 + _MARGIN else f"file no smaller, {packed:.1f} x compressed")
    change = row["accuracy"] - original["accuracy"]
    words.append(f"accuracy {100 * change:+.1f} points" + (", within noise" if abs(change) <= noise else ""))
    return "; ".join(words)


def cost_us(row: Mapping[str, Any]) -> tuple[float, float]:
    """(dispatch, each row) in microseconds, of the line through the p50s at both batch sizes."""
    (few, many), (one, all_) = BATCHES, (row["b1_p50_us"], row["b32_p50_us"])
    each = max(0.0, (all_ - one) / (many - few))
    return max(0.0, one - few * each), each


def sweep(
    widths: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048), *, compiled: bool = False, turns: int = 15,
    each: int = 10,
) -> "pd.DataFrame":  # fmt: skip
    """Speed-up and file size of every technique on an mlp 64-w-w-10, by width w and batch size.

    Weights are random: time does not depend on their values. ``pruned`` zeroes half of them, ``pruned, structured``
    takes half of the neurons, ``distilled`` has a quarter of them. With ``compiled``, torch.compile too; see
    :func:`compiled_engine`.

    Returns:
        Columns ``width``, ``technique``, ``batch``, ``p50_us``, ``p99_us``, ``low``, ``times``, ``high``, ``smaller``
        (the original's file size over its own).

    Cost: about 3 s a width, most of it for exports.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for width in widths:
        with tempfile.TemporaryDirectory() as folder, Registry(folder) as registry:
            made = _techniques(registry, width)
            source, config = RegistrySource(registry, "m"), ServingConfig()
            engines = {key: load_engine(source, str(number), config) for key, number in made.items()}
            sizes = {key: registry.manifest("m", number).weights_nbytes for key, number in made.items()}
            if compiled:
                engines["compiled"] = compiled_engine(engines[""])
                sizes["compiled"] = sizes[""]
            original = engines.pop("")
            for batch in BATCHES:
                for key, speed in race(original, engines, batch, turns, each).items():
                    what = {"width": width, "technique": key or "original", "batch": batch}
                    rows.append({**what, **speed._asdict(), "smaller": sizes[""] / sizes[key]})
    return pd.DataFrame(rows)


def compiled_engine(engine: InferenceEngine) -> InferenceEngine:
    """The same model through ``torch.compile``, compiled and warm. For this process only; the first takes a minute.

    Raises:
        InvalidModelError: It does not compile here: no C++ compiler, a model that is not torch's (``onnx``).
    """
    if isinstance(engine.model, OnnxModel):
        raise InvalidModelError("an ONNX graph runs outside torch: there is nothing that torch.compile could compile")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*torch\.jit\.script", DeprecationWarning)  # torch's own, at import
            module: Any = torch.compile(engine.model, dynamic=True)
            made = InferenceEngine(
                module, engine.preprocessor, engine.postprocessor, version=f"{engine.version}, compiled", owned=True
            )
            made.warmup()
    except Exception as error:  # whatever the compiler meets
        raise InvalidModelError(f"torch.compile does not work here: {str(error.__cause__ or error)[:300]}") from error
    return made


def _techniques(registry: Registry, width: int) -> dict[str, int]:
    """Publish an mlp of random weights and what the techniques make of it: technique -> version; "" is the original."""
    torch.manual_seed(0)

    def publish(hidden: int) -> int:
        parameters = {"sizes": [64, hidden, hidden, 10]}
        module = models.build("mlp", parameters)
        return registry.publish("m", module, architecture="mlp", parameters=parameters).version

    calibration: NDArray[np.float32] = np.random.default_rng(0).standard_normal((256, 64), dtype=np.float32)
    made = {"": publish(width), "distilled": publish(max(1, width // 4))}
    made["pruned"] = optimization.prune(registry, "m", 1, 0.5).version
    made["pruned, structured"] = optimization.prune(registry, "m", 1, 0.5, structured=True).version
    made["onnx"] = optimization.to_onnx(registry, "m", 1).version
    for method in optimization.METHODS:
        data = calibration if method == "static" else None
        made[f"quantised, {method}"] = optimization.quantise(registry, "m", made["onnx"], method, data).version
    return made


def claims(swept: "pd.DataFrame") -> "pd.DataFrame":
    """The tutorial's claims beside a sweep: one row per technique and batch size.

    Columns: ``claimed`` (times faster, at least), ``least`` and ``most`` (medians over the widths), ``pays_from`` (the
    smallest width from which on it is faster at every width; <NA>: none), ``holds_from`` (the same for the claim).
    """
    import pandas as pd

    rows = []
    for (technique, batch), part in swept[swept.technique != "original"].groupby(["technique", "batch"], sort=False):
        part = part.sort_values("width")
        claimed = CLAIMS.get(str(technique).split(",")[0], (math.nan, math.nan))[0]
        rows.append({
            "technique": technique, "batch": batch, "claimed": claimed, "least": part.times.min(),
            "most": part.times.max(), "pays_from": _from(part, part.low > 1 + _MARGIN),
            "holds_from": _from(part, part.times >= claimed),
        })  # fmt: skip
    frame = pd.DataFrame(rows).set_index(["technique", "batch"])
    return frame.astype({"pays_from": "Int64", "holds_from": "Int64"})


def _from(part: "pd.DataFrame", holds: "pd.Series[bool]") -> int | None:
    """The width from which on it holds without a gap."""
    lasting = holds[::-1].cummin()[::-1]
    return int(part.width[lasting].min()) if lasting.any() else None
