"""A process that forks devices in the midst of their updates and kills them; run by
test_edge_process.py.

It imports torch once and forks from there, so that a kill costs milliseconds. One line on its input
is one kill: the round that the cloud released last. It answers each with a line: the round that the
device has then, or what is wrong.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from edge_cloud import state
from flserving import Registry
from flserving.edge import EdgeModelServer, delta
from flserving.edge.sync import Memory, SyncAgent, SyncSettings
from flserving.models import weights
from flserving.registry.registry import WEIGHTS
from registry_crash import fork


def update(root, url, form, report):
    """What the device's process does with one pull: all of it, its server included."""
    with Registry(root) as registry:
        memory = Memory(registry)
        with EdgeModelServer(registry=registry, model="m", client="c-1", wall=memory.wall) as edge:
            settings = SyncSettings(memory=memory)
            agent = SyncAgent(
                url,
                "c-1",
                registry,
                edge=edge,
                model="m",
                client="c-1",
                form=form,
                settings=settings,
            )
            with contextlib.closing(agent):
                os.write(report, b"<")
                agent.pull()
                os.write(report, b">")


def check(root, form):
    """The round that a device runs after its restart; 0 where it has none yet. AssertionError: it
    is not whole."""
    with Registry(root) as registry:
        whole = [int(path.parent.name) for path in Path(root, "models", "m").glob(f"*/{WEIGHTS}")]
        for number in {*registry.version_numbers("m")} & {*whole, *registry.aliases("m").values()}:
            artifact = registry.read("m", number)
            wanted = state(artifact.manifest.lineage.round, artifact.manifest.parameters["sizes"])
            wanted = delta.quantised(wanted) if form == "int8" else wanted
            assert weights.digest(artifact.tensors) == weights.digest(wanted), (
                f"version {number} is not whole"
            )
            assert artifact.heads is not None, f"version {number} lost its head"
        if "default" not in registry.aliases("m"):
            return 0
        with EdgeModelServer(registry=registry, model="m", client="c-1") as edge:
            rows = np.zeros(
                (1, registry.manifest("m", registry.resolve("m")).signature.input_shape[0]),
                np.float32,
            )
            answer = edge.predict(rows)
            assert answer["head"] == "own", "the head came apart from its body"
            return answer["round"]


def main(root, url, form, seed):
    rng, before, pull_s = random.Random(int(seed)), 0, 0.05
    for line in sys.stdin:
        released = int(line)
        reports, report = os.pipe()
        pid = fork(lambda report=report: update(root, url, form, report))
        os.read(reports, 1)
        began_s = time.monotonic()
        if rng.random() < 0.2:  # now and then one comes through, and tells how long that takes
            os.read(reports, 1)
            pull_s = 0.5 * pull_s + 0.5 * (time.monotonic() - began_s)
        else:
            time.sleep(rng.uniform(0, 1.1 * pull_s))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reports)
        os.close(report)
        reports, report = os.pipe()
        pid = fork(lambda report=report: os.write(report, b"%d" % check(root, form)))
        os.close(report)
        status = os.waitpid(pid, 0)[1]
        found = os.read(reports, 20)
        os.close(reports)
        assert status == 0 and found, f"the device does not start after round {released}"
        assert before <= int(found) <= released, f"round {int(found)} after {before}"
        before = int(found)
        print(before, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
