"""How sure is sure enough: the confidence below which a device had better ask the cloud.

Source of the rule (answer if the confidence reaches a threshold, else pass on): C. K. Chow, "On
optimum recognition error and reject tradeoff", IEEE Trans. Inf. Theory 1970; of choosing the
threshold on held-out data: Y. Geifman and R. El-Yaniv, "Selective classification for deep neural
networks", NeurIPS 2017.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flserving.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold and what it gave on the held-out rows: the ``accuracy`` of the two together, its
    standard error, the ``share`` of rows that went to the cloud."""

    threshold: float
    accuracy: float
    standard_error: float
    share: float


def calibrate(
    confidences: ArrayLike, local_correct: ArrayLike, cloud_correct: ArrayLike, *, accuracy: float
) -> Calibration:
    """The smallest threshold for "the device answers where its confidence is at least that, else
    the cloud" with which the two together reach ``accuracy``: the fewest rows leave the device.

    Every threshold that tells two rows apart is tried, from the lowest (the device answers all) to
    one above all confidences (the cloud does); nothing is assumed of how confidence and accuracy go
    together. The accuracy is that of the rows given, so take rows on which neither model was
    trained, and read it with its standard error.

    Args:
        confidences: Of the device's answers, [N] in [0, 1].
        local_correct, cloud_correct: Whether the device and the cloud were right about each row,
            [N].
        accuracy: Share of the rows that the two together must answer correctly.

    Raises:
        ConfigError: Arrays of different lengths, a number outside [0, 1], or no threshold reaches
            the accuracy.

    Cost: a sort.
    """
    sure = np.asarray(confidences, np.float64)
    local = np.asarray(local_correct, bool)
    cloud = np.asarray(cloud_correct, bool)
    if sure.ndim != 1 or not len(sure) or not sure.shape == local.shape == cloud.shape:
        raise ConfigError(
            f"{sure.shape} confidences, {local.shape} and {cloud.shape} outcomes: give one each for N rows"
        )
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ConfigError(
            "a confidence lies outside [0, 1]: give the probabilities of the predicted classes"
        )
    if not 0 <= accuracy <= 1:
        raise ConfigError(f"accuracy is {accuracy!r}: it must lie in [0, 1], e.g. 0.95")
    order = np.argsort(sure, kind="stable")
    sure = sure[order]
    n = len(sure)
    # right[k]: rows answered correctly when the k least sure go to the cloud
    right = local.sum() + np.concatenate([[0], np.cumsum(cloud[order].astype(int) - local[order])])
    # equal confidences go together
    cuts = np.concatenate([[0], 1 + np.flatnonzero(np.diff(sure)), [n]])
    good = right[cuts] >= math.ceil(accuracy * n - 1e-9)
    if not good.any():
        raise ConfigError(
            f"no threshold reaches an accuracy of {accuracy}: the best is {right[cuts].max() / n:.4f}"
        )
    sent = int(cuts[good][0])
    if sent == 0:
        threshold = 0.0
    elif sent < n:
        threshold = float(sure[sent])
    else:
        threshold = math.nextafter(float(sure[-1]), 2.0)  # above all confidences
    reached = float(right[sent] / n)
    error = math.sqrt(reached * (1 - reached) / n)
    return Calibration(threshold, reached, standard_error=error, share=sent / n)
