"""Figures of notebook 00: they say what they are given, and draw on a used figure as on a new one."""

import numpy as np
import pytest

from flserving.lab import figures_00
from flserving.lab.style import png
from flserving.models.processing import ABSTAIN


def texts(fig):
    return [text.get_text() for ax in fig.axes for text in (*ax.texts, ax.title, ax._left_title)]


def answers(threshold, count=60):
    rng = np.random.default_rng(1)
    classes, labels = rng.integers(0, 10, count), rng.integers(0, 10, count)
    confidences = np.linspace(0.2, 0.99, count, dtype=np.float32)
    predictions = np.where(confidences < threshold, ABSTAIN, classes)
    images = rng.uniform(0, 16, (count, 64)).astype(np.float32)
    return figures_00.Answers(threshold, images, labels, predictions, confidences, classes)


def test_the_stack_names_every_part_inside_its_frame():
    fig = figures_00.stack_figure()
    wanted = {"Federated rounds", "Registry", "Loader", "Model cache", "Preprocessor", "Batch queue",
              "Inference engine", "Postprocessor", "notebook", "REST: web, mobile", "gRPC: devices"}  # fmt: skip
    assert wanted <= set(texts(fig))
    png(fig)  # lays it out
    frame = fig.bbox
    for ax in fig.axes:
        for text in ax.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, f"{text.get_text()!r} leaves the picture"


@pytest.mark.parametrize(("said", "label", "title"), [(3, 3, "says 3"), (4, 3, "says 4"), (ABSTAIN, 3, "says nothing")])
def test_an_answer_shows_its_probabilities(said, label, title):
    probabilities = np.full(10, 0.05)
    probabilities[4] = 0.55
    answer = {"probabilities": [probabilities.tolist()], "predictions": [said], "model_version": "7"}
    fig = figures_00.answer_figure(np.zeros(64, np.float32), answer, label)
    bars = fig.axes[1].patches
    assert [bar.get_height() for bar in bars] == probabilities.tolist()
    assert f"version 7 {title}" in texts(fig)
    colours = {bar.get_facecolor() for bar in bars}
    assert len(colours) == (1 if said == ABSTAIN else 2), "only the chosen class stands out"


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_abstentions_and_the_trade(threshold):
    given = answers(threshold)
    fig = figures_00.abstention_figure(given)
    shown = [text.get_text() for text in fig.axes[0].texts]
    order = np.argsort(given.confidences, kind="stable")
    assert len(shown) == 40
    assert shown[0] == ("?" if given.predictions[order[0]] == ABSTAIN else str(given.predictions[order[0]]))
    assert shown.count("?") == (0 if threshold == 0 else 40 if threshold == 1 else pytest.approx(25, abs=8))
    answered = given.predictions != ABSTAIN
    (told,) = [text.get_text() for text in fig.axes[1].texts]
    assert f"{answered.mean():.0%} answered" in told
    curve = fig.axes[1].lines[0].get_ydata()
    assert curve[-1] == pytest.approx((given.classes == given.labels).mean())
    if answered.any():
        accuracy = (given.predictions == given.labels)[answered].mean()
        assert f"{accuracy:.1%} of the answers are right" in told
        assert curve[answered.sum() - 1] == pytest.approx(accuracy), "the dot lies on the curve"
