"""The threshold on held-out rows, against trying every threshold there is."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flserving.edge.calibration import calibrate
from flserving.errors import ConfigError

GOALS = st.integers(0, 840).map(lambda part: part / 840)  # many of them are exactly k/N
ROWS = st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.booleans()), min_size=1, max_size=30)


def outcome(rows, threshold):
    """Rows right, rows sent to the cloud: what a device with this threshold does."""
    right = [local if confidence >= threshold else cloud for confidence, local, cloud in rows]
    return sum(right), sum(confidence < threshold for confidence, *_ in rows)


def every_outcome(rows):
    thresholds = [0.0, *sorted({confidence for confidence, *_ in rows}), 2.0]
    return [outcome(rows, threshold) for threshold in thresholds]


@given(ROWS, GOALS)
def test_the_accuracy_is_reached_and_no_smaller_share_would_do(cells, wanted):
    rows = [(cell / 8, local, cloud) for cell, local, cloud in cells]
    enough = [sent for right, sent in every_outcome(rows) if right / len(rows) >= wanted - 1e-9]
    columns = zip(*rows, strict=True)
    if not enough:
        with pytest.raises(ConfigError, match="the best is"):
            calibrate(*columns, accuracy=wanted)
        return
    found = calibrate(*columns, accuracy=wanted)
    right, sent = outcome(rows, found.threshold)
    assert sent == min(enough) == round(found.share * len(rows)) and found.accuracy == right / len(
        rows
    )
    assert found.standard_error == pytest.approx(
        math.sqrt(found.accuracy * (1 - found.accuracy) / len(rows))
    )


def test_a_device_that_is_right_when_it_is_sure_keeps_what_it_is_sure_of():
    rng = np.random.default_rng(7)
    confidences = rng.uniform(0.3, 1, 20_000)
    local, cloud = rng.uniform(size=20_000) < confidences, rng.uniform(size=20_000) < 0.95
    found = calibrate(confidences, local, cloud, accuracy=0.9)
    # accuracy(t) = E[c; c >= t] + 0.95 P(c < t) with c uniform on [0.3, 1]: t = 0.681 for 0.9
    assert found.threshold == pytest.approx(0.681, abs=0.02) and found.accuracy == pytest.approx(
        0.9, abs=1e-3
    )
    assert found.share == pytest.approx(0.544, abs=0.03) and found.standard_error == pytest.approx(
        0.0021, abs=1e-4
    )


def test_the_two_ends():
    assert calibrate([0.4, 0.9], [1, 1], [0, 0], accuracy=1.0).threshold == 0
    above = calibrate([0.4, 1.0], [0, 0], [1, 1], accuracy=1.0)
    assert above.share == 1 and 1 < above.threshold < 1.000001


@pytest.mark.parametrize(
    ("arrays", "accuracy"),
    [(([], [], []), 0.5), (([0.5], [1, 0], [1]), 0.5), (([[0.5]], [[1]], [[1]]), 0.5), (([1.5], [1], [1]), 0.5),
     (([float("nan")], [1], [1]), 0.5), (([0.5], [1], [1]), 1.5), (([0.5], [1], [1]), float("nan"))],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_calibrated_is_refused(arrays, accuracy):
    with pytest.raises(ConfigError):
        calibrate(*arrays, accuracy=accuracy)
