"""The report says what was measured: its sums and its words are judged here, never the speed of
this machine."""

import math
import runpy
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flserving import Registry, ServingConfig, models
from flserving.errors import InvalidModelError
from flserving.federated import train
from flserving.federated.rounds import publish_rounds
from flserving.lab.measuring import optimization as lab
from flserving.lab.measuring.sweep import compiled_engine
from flserving.models.onnx import OnnxModel
from flserving.optimize import methods
from flserving.serving.engine import InferenceEngine
from flserving.serving.loader import RegistrySource, load_engine

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "backends.py"


def test_the_claims_are_compared_width_by_width():
    times = {16: 0.9, 64: 3.0, 256: 1.5, 1024: 2.5}  # faster at 64, not lasting for the claim
    swept = pd.DataFrame(
        [
            {"width": w, "technique": "onnx", "batch": 1, "times": t, "low": t - 0.1}
            for w, t in times.items()
        ]
        + [{"width": w, "technique": "pruned", "batch": 1, "times": 1.0, "low": 0.9} for w in times]
        + [
            {"width": w, "technique": "original", "batch": 1, "times": 1.0, "low": 1.0}
            for w in times
        ]
    )
    found = runpy.run_path(str(SCRIPT))["claims"](swept)
    assert found.loc[("onnx", 1)].tolist() == [2, 0.9, 3.0, 64, 1024]
    assert pd.isna(found.loc[("pruned", 1), "pays_from"]) and pd.isna(
        found.loc[("pruned", 1), "holds_from"]
    )
    assert list(found.index) == [("onnx", 1), ("pruned", 1)]


def test_a_report_of_versions(tmp_path):
    run = train(rounds=2, num_clients=5, alpha=1.0, progress=False)
    with Registry(tmp_path) as registry:
        publish_rounds(registry, "digits")(run.final)
        methods.prune(registry, "digits", 1, 0.9, tolerance=1)
        methods.prune(registry, "digits", 2, 0.5, structured=True, tolerance=1)  # a chain
        frame = lab.report(
            registry, "digits", [3, 2, 1], run.clients, memory=False, turns=2, each=2
        )
        metrics = registry.manifest("digits", 1).metrics
    assert list(frame.index) == [3, 2, 1] and frame.original.tolist() == [1, 1, 1]
    assert frame.optimisation.tolist() == ["pruned, structured", "pruned", ""] and set(
        frame.backend
    ) == {"torch"}
    assert frame.accuracy[1] == pytest.approx(metrics["global_accuracy"])
    assert frame.worst_client[1] == pytest.approx(metrics["worst_client_accuracy"])
    assert frame.agreement[1] == 1 > frame.agreement[2]
    assert (frame.points[1], frame.worst_points[1]) == (0, 0)
    assert frame.points[2] == pytest.approx(100 * (frame.accuracy[2] - frame.accuracy[1]))
    assert frame.worst_points[3] == pytest.approx(
        100 * (frame.worst_client[3] - frame.worst_client[1])
    )
    assert frame.file_kb[1] == frame.file_kb[2] > 1.8 * frame.file_kb[3]
    assert frame.compressed_kb[2] < 0.5 * frame.compressed_kb[1]
    times = frame.filter(regex=r"^b\d").to_numpy()
    assert np.isfinite(times).all() and (times > 0).all()
    assert frame.b1_times[1] == frame.b32_high[1] == 1, "the original against itself"
    assert (frame.b32_p50_us <= frame.b32_p99_us).all() and (frame.b1_low <= frame.b1_high).all()
    assert frame.noise_points[1] == 0 < frame.noise_points[2]


def test_peak_memory_counts_the_weights(tmp_path):
    sizes = {"sizes": [64, 2048, 1024, 10]}
    with Registry(tmp_path) as registry:
        registry.publish("m", models.build("mlp", sizes), architecture="mlp", parameters=sizes)
        mb = registry.manifest("m", 1).weights_nbytes / 2**20
        peak = lab.peak_mb(registry, "m", 1)
        assert mb < peak < mb + 100 or (
            math.isnan(peak) and not Path("/proc/self/clear_refs").exists()
        )


def test_every_backend_has_its_row():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    script = runpy.run_path(str(SCRIPT))
    frame = script["rows"](quick=True)
    techniques = {"original", "onnx", "distilled", "pruned", "pruned, structured"}
    techniques |= {f"quantised, {method}" for method in methods.METHODS}
    assert set(zip(frame.technique, frame.batch, strict=True)) == {
        (it, b) for it in techniques for b in lab.BATCHES
    }
    assert (
        np.isfinite(frame.times).all()
        and (frame.low <= frame.times).all()
        and (frame.times <= frame.high).all()
    )
    text = script["markdown"](frame)
    assert text.count("\n") == 1 + 2 * (len(techniques) - 1) and "| onnx | 1 | **" in text
    assert set(script["claims"](frame).index) == {
        (it, b) for it in techniques - {"original"} for b in lab.BATCHES
    }


def test_what_is_not_torch_is_not_compiled():
    engine = InferenceEngine(OnnxModel(4, 4, 8), owned=True)
    with pytest.raises(InvalidModelError, match="outside torch"):
        compiled_engine(engine)


@pytest.mark.slow
def test_a_compiled_engine_answers_as_its_original_or_says_why_not(tmp_path):
    """With a C++ compiler the one, without it the other."""
    sizes = {"sizes": [64, 16, 10]}
    with Registry(tmp_path) as registry:
        registry.publish("m", models.build("mlp", sizes), architecture="mlp", parameters=sizes)
        engine = load_engine(RegistrySource(registry, "m"), "1", ServingConfig())
    rows = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
    try:
        made = compiled_engine(engine)
    except InvalidModelError as error:
        assert "torch.compile does not work here" in str(error) and shutil.which("g++") is None
    else:
        given, wanted = (it.predict(rows)["probabilities"] for it in (made, engine))
        np.testing.assert_allclose(given, wanted, atol=1e-6)


def test_a_compiler_that_is_missing_is_a_message(monkeypatch):
    def refuses(module, **options):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr("torch.compile", refuses)
    engine = InferenceEngine(models.build("mlp", {"sizes": [4, 3]}))
    with pytest.raises(
        InvalidModelError, match=r"torch\.compile does not work here: no working C\+\+ compiler"
    ):
        compiled_engine(engine)
