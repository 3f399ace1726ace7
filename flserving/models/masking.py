"""Confidence masking: how much of a model's outputs an answer shows. A server sets it for a role or
for one credential.

A row that a model was trained on gets a higher confidence than one that it never saw: whoever sees
confidences can guess who took part in the training. Masking takes away the numbers, not what the
model has learned by heart; so the label alone still tells something. Source: Choquette-Choo et al.,
ICML 2021 (arXiv 2007.14321), who named the term. ``flserving.lab.federated.membership`` measures
it.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

from flserving.errors import ConfigError, ForbiddenError

OUTPUTS = ("predictions", "confidences", "probabilities")
_NAME = re.compile(r"full|label|top-([1-9]\d{0,3})|rounded-([1-6])")
_ALL = 1 << 62  # more classes and decimals than there are


class OutputPolicy(NamedTuple):
    """What the answers of a classifier show, by its ``name``.

    "full": all of it. "top-K", as "top-3": the probabilities of the K likeliest classes of a row;
    the others are 0. "rounded-D", as "rounded-2": confidences and probabilities to D decimals, 1 to
    6. "label": neither confidences nor probabilities. Predictions are never changed: so of a
    regression nothing is masked.

    Source: all three are mitigations that Shokri et al. tried, IEEE S&P 2017 (arXiv 1610.05820).

    Example:
        >>> import numpy as np
        >>> shares = np.array([[0.12, 0.66, 0.22]])
    >>> outputs = {"predictions": np.array([1]), "probabilities": shares}
        >>> OutputPolicy.parse("top-2").shown(outputs, arrays=False)
        {'predictions': [1], 'probabilities': [[0.0, 0.66, 0.22]], 'outputs': 'top-2'}
    """

    name: str = "full"
    top: int = _ALL
    digits: int = _ALL

    @classmethod
    def parse(cls, name: str) -> "OutputPolicy":
        """The policy of this name. Raises ConfigError."""
        found = _NAME.fullmatch(str(name))
        if found is None:
            raise ConfigError(
                f"outputs: no policy {name!r:.64}: choose full, label, top-K (K classes) or rounded-D (1 to 6 decimals)"
            )
        if name == "label":
            return cls(name, 0, 0)
        top, digits = found.groups()
        return cls(name, int(top or _ALL), int(digits or _ALL))

    @property
    def offered(self) -> tuple[str, ...]:
        """The outputs of a classification that are there at all."""
        return OUTPUTS if self.top else OUTPUTS[:1]

    def narrowed(self, name: str) -> "OutputPolicy":
        """The policy of this name. Raises ForbiddenError where it shows more than this one."""
        asked = self.parse(name)
        if asked.top > self.top or asked.digits > self.digits:
            raise ForbiddenError(
                f"outputs={name!r} shows more than {self.name!r}, the most here: ask for that or less"
            )
        return asked

    def shown(self, outputs: Mapping[str, NDArray[Any]], arrays: bool) -> dict[str, Any]:
        """What an answer holds of a model's outputs, as numpy arrays or as lists, and the policy's
        name."""
        found = {name: outputs[name] for name in self.offered if name in outputs}
        if self.top < _ALL and "probabilities" in found:
            probabilities = found["probabilities"]
            rank = (-probabilities).argsort(kind="stable").argsort()
            found["probabilities"] = probabilities * (rank < self.top)
        if self.digits < _ALL:
            found |= {name: found[name].round(self.digits) for name in OUTPUTS[1:] if name in found}
        answer = found if arrays else {name: output.tolist() for name, output in found.items()}
        return {**answer, "outputs": self.name}


FULL = OutputPolicy()


def by_role(text: str) -> dict[str, OutputPolicy]:
    """The policies in a setting such as "label,admin=full", by role. What is said of no role, in
    whatever place, is for callers without one, and for all roles of which nothing is said.

    Raises:
        ConfigError: No such policy or role, or two for one.
    """
    said = dict[str, OutputPolicy]()
    for part in str(text).split(","):
        role, _, name = part.rpartition("=")
        if role not in ("", "infer", "admin"):
            raise ConfigError(
                f"outputs: no role {role!r:.64} to infer: write infer=POLICY, admin=POLICY, or POLICY"
            )
        if role in said:
            raise ConfigError(
                f"outputs: {text!r:.64} has two policies for {role or 'all roles'}: leave one"
            )
        said[role] = OutputPolicy.parse(name)
    return dict.fromkeys(("", "infer", "admin"), said.get("", FULL)) | said
