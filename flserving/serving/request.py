"""One request on its way through a server: what was asked, and what each step of the way found."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flserving.experiments.controller import Chosen
from flserving.models.masking import OutputPolicy
from flserving.models.processing import Floats
from flserving.serving.engine import Prediction


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """What was asked, as in :meth:`ModelServer.predict`, then what the steps of the way found.

    Args:
        identity: The client that the caller's credential names. It decides the arm of an experiment
            where no ``client`` is given, which asks for personal answers.
        policy: What the caller's credential may see; without one, what the config says of callers
            in this process.
        personal: False: the global model answers, on a device as well, whose client is known.
        nested: It is a part of another request, which counts the path that its answer took.
    """

    features: Any
    version: str | int | None = None
    model: str | None = None
    timeout_ms: float | None = None
    stages: bool = False
    arrays: bool = False
    client: str | Sequence[str] | None = None
    caller: str | None = None
    outputs: str | None = None
    policy: OutputPolicy | None = None
    identity: str | None = None
    personal: bool = True
    nested: bool = False

    # admitted
    started_s: float = field(init=False)
    deadline_s: float = field(init=False)
    # (model, version); None while the routes do not know it
    key: Any = field(init=False, default=None)
    # the arm, where the alias is in an experiment
    chosen: Chosen | None = field(init=False, default=None)
    # pins the model in memory; None while it is not there
    lease: Any = field(init=False, default=None)

    # prepared
    engine: Any = field(init=False)  # the version's own
    # what the batch runs on: the version's own engine, or the one of its heads
    runner: Any = field(init=False)
    rows: Floats = field(init=False)
    # of the clients' heads, one a row
    slots: NDArray[np.int64] | None = field(init=False, default=None)
    # what was found of the client's head, or of each row's
    head: Any = field(init=False, default=None)
    prepared_s: float = field(init=False)

    # run
    looked_up_s: float = field(init=False)
    cache_key: Any = field(init=False)
    flight: Any = field(init=False)  # the future of an identical request at the same time
    # whether this one computes what the others of the flight wait for
    leads: bool = field(init=False)
    prediction: Prediction = field(init=False)

    @property
    def payload(self) -> Any:
        """What the runner takes."""
        return self.rows if self.slots is None else (self.rows, self.slots)


async def finished(future: Future[Any], timeout_s: float) -> bool:
    """Wait for the work of a thread or of another request; False when the time is over first."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: object) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits there any more
            loop.call_soon_threadsafe(done.set)

    # not asyncio.wrap_future: who is cancelled must not cancel the others' work
    future.add_done_callback(wake)
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await done.wait()
    return future.done()
