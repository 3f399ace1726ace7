"""Models whose behaviour a test controls, and the small tools of the tests that run threads."""

import gc
import threading
import time
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from flserving.serving.config import ServingConfig
from flserving.serving.server import ModelServer

POISON = -666.0
"""A row that starts with this number makes a :class:`Poison` model fail."""
PATIENCE_S = 100
"""How long a test waits for what must happen, on the busiest machine; a test that needs it all has
failed."""


class Probe:
    """What a model under test counts, and what holds it back. All copies of a model share one
    probe.

    A model passes through :meth:`inside`: it is counted in, waits while the gate is shut, and is
    counted out.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._permits = float("inf")
        self.calls = self.rows = self.inside_now = self.most_inside = 0
        self.batches = []  # rows of each call, in order
        self.seen = []  # first feature of every row, in order

    def __deepcopy__(self, memo):
        return self

    def shut(self):
        """From now on every execution waits; the counters start at zero."""
        with self._changed:
            self._permits = 0
            self.calls = self.rows = self.most_inside = 0
            self.batches, self.seen = [], []

    def release(self, executions=float("inf")):
        with self._changed:
            self._permits += executions
            self._changed.notify_all()

    @contextmanager
    def inside(self, firsts):
        with self._changed:
            self.calls += 1
            self.rows += len(firsts)
            self.batches.append(len(firsts))
            self.seen.extend(firsts)
            self.inside_now += 1
            self.most_inside = max(self.most_inside, self.inside_now)
            self._changed.notify_all()
            released = self._changed.wait_for(lambda: self._permits > 0, PATIENCE_S)
            self._permits -= 1
        try:
            assert released, "nobody released the model"
            yield
        finally:
            with self._changed:
                self.inside_now -= 1
                self._changed.notify_all()

    def wait_inside(self, executions):
        """Block until that many executions are under way."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.inside_now >= executions, PATIENCE_S), (
                f"{self.inside_now} executions under way, {executions} expected"
            )


class Constant(nn.Module):
    """Answers ``value`` to every row (regression)."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([float(value)]))

    def forward(self, x):
        return self.value.expand(len(x), 1)


class Tagged(nn.Module):
    """Answers every row with itself (regression): whoever gets another row's answer notices."""

    def forward(self, x):
        return x * 1.0


class Gated(Tagged):
    """:class:`Tagged`, held back and counted by a :class:`Probe`."""

    def __init__(self, probe):
        super().__init__()
        self.probe = probe

    def forward(self, x):
        with self.probe.inside(x[:, 0].tolist()):
            return x * 1.0


class Poison(Gated):
    """:class:`Gated`, and a row that starts with ``POISON`` makes the whole batch fail."""

    def __init__(self, probe, how):
        super().__init__(probe)
        self.how = how

    def forward(self, x):
        out = super().forward(x)
        if (x[:, 0] == POISON).any():
            if self.how == "nan":
                out = torch.where(x[:, :1] == POISON, torch.nan, out)
            else:
                raise {"raise": RuntimeError, "interrupt": KeyboardInterrupt, "exit": SystemExit}[
                    self.how
                ]("poison")
        return out


def serving(module=None, version="v1.0", *, num_features=2, **settings):
    """A server of one regression model; ``settings`` are those of :class:`ServingConfig`."""
    settings = {"warmup_samples": 1, "timeout_ms": PATIENCE_S * 1e3, **settings}
    server = ModelServer(ServingConfig(**settings))
    if module is not None:
        server.load_model(version, module, output_type="regression", num_features=num_features)
    return server


def row(first, width=2):
    """One request of one row that starts with ``first``."""
    return np.full((1, width), first, np.float32)


def wait_until(happened, what="the state that the test waits for"):
    """Poll ``happened()``: for states that nobody signals."""
    until_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < until_s, f"{what} did not come"
        time.sleep(0.001)


class Threads:
    """Threads that are joined, and whose results or errors are collected in the order of their
    start."""

    def __init__(self):
        self._threads, self._outcomes = [], []

    def start(self, call, *args, **kwargs):
        place = len(self._outcomes)
        self._outcomes.append(None)

        def run():
            try:
                self._outcomes[place] = call(*args, **kwargs)
            except BaseException as error:
                self._outcomes[place] = error

        thread = threading.Thread(target=run, name=f"caller-{place}", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def outcomes(self):
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), f"{thread.name} is still waiting"
        return self._outcomes

    def results(self):
        for outcome in self.outcomes():
            if isinstance(outcome, BaseException):
                raise outcome
        return self._outcomes


def flserving_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("flserving")}


def collected(reference):
    """Whether a weak reference's object can be collected now."""
    gc.collect()
    return reference() is None
