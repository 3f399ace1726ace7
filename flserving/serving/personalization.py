"""The personal lane: the body once for a whole batch, then every row's own head, gathered and applied together.

Source: a batch over one shared base with one adapter per row, as in Punica (Chen et al., MLSys 2024, arXiv 2310.18547)
and S-LoRA (Sheng et al., MLSys 2024, arXiv 2311.03285); here with whole heads, on a CPU.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flserving.models import as_split
from flserving.models.processing import Floats
from flserving.registry.heads import EXPIRED, STALE, UNKNOWN, HeadStore
from flserving.serving.engine import InferenceEngine, Lane, Prediction, lean

Slots = NDArray[np.int64]
_FOUND = {UNKNOWN: "unknown", STALE: "stale", EXPIRED: "expired"}


class PersonalEngine(Lane):
    """The heads of a loaded version on its body: what a batch of several clients runs on.

    Args:
        engine: The version's own engine, whose module, preprocessing and limits are shared.
        store: Its heads.

    ``identity`` names all that an answer depends on beside the slot and the row. Its executions are counted with the
    engine's.
    """

    def __init__(self, engine: InferenceEngine, store: HeadStore) -> None:
        # holds parts of the engine, not the engine: in a circle, neither would go before the next garbage collection
        super().__init__(
            engine.version, engine.preprocessor, engine.postprocessor, engine.max_batch_size, engine._clock
        )
        self._executions = engine._executions
        self.store, self.identity = store, f"{engine.identity}/{store.digest}"
        model = as_split(engine.model)
        self._body, self._head = lean(model.body), lean(model.head)

    def choose(self, clients: str | Sequence[str], rows: int) -> tuple[Slots, str | list[str]]:
        """Slots [rows] of these clients' heads, and what was found: "own", "unknown", "stale" or "expired".

        One client has all rows; of several there is one a row (the server sees to that), and one word a row comes back.
        """
        if isinstance(clients, str):
            slot = self.store.find(clients)
            return np.full(rows, slot), _FOUND.get(slot, "own")
        slots = [self.store.find(client) for client in clients]
        return np.array(slots), [_FOUND.get(slot, "own") for slot in slots]

    def execute(self, payloads: Sequence[tuple[Floats, Slots]]) -> list[Prediction]:
        """Run requests, each rows float32 [n, D] and their slots [n], as one batch; one prediction each, in order.

        Raises:
            ModelExecutionError: As :meth:`InferenceEngine.execute`. CorruptArtifactError: A head's bytes have changed.
        """
        rows = np.concatenate([rows for rows, _ in payloads])
        slots = np.concatenate([slots for _, slots in payloads])
        return self.run(
            rows, [len(part) for part, _ in payloads],
            lambda i, j: self.forward(rows[i:j], True, lambda values: self._infer(values, slots[i:j])),
        )  # fmt: skip

    def _infer(self, values: Tensor, slots: Slots) -> Tensor:
        for step, arguments in self._body:
            values = step(values, *arguments)
        inputs, generic = values, None
        if self.store.layout != "head":
            generic = values
            for step, arguments in self._head:
                generic = step(generic, *arguments)
        if self.store.layout == "adapter":
            assert generic is not None
            inputs, generic = generic, None
        heads = self.store.gather(slots)
        ones = inputs.new_ones(len(inputs), 1)
        rows = torch.cat([inputs, ones], dim=1)[:, None]  # one product with the bias inside: an eighth less than two
        own = torch.bmm(rows, heads) if generic is None else torch.baddbmm(generic[:, None], rows, heads)
        return own[:, 0]


def each(found: str | list[str]) -> list[str]:
    """What :meth:`PersonalEngine.choose` found, as a list."""
    return [found] if isinstance(found, str) else found
