"""A process that forks edge devices and kills them while they update: run by the tests of the edge.

It imports torch once and forks from there; the parent never holds a registry open nor a thread
alive across a fork. Prints one line of JSON.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flserving.edge import EdgeModelServer
from flserving.registry import Registry
from flserving.serving.config import ServingConfig
from forked import fork

MLP: dict[str, Any] = {"architecture": "mlp", "parameters": {"sizes": [2, 2, 1]}}


def state_of(value: float) -> dict[str, torch.Tensor]:
    """A regression that answers ``value`` to every row; each value has a body of its own."""
    return {
        "body.0.weight": torch.zeros(2, 2),
        "body.0.bias": torch.full((2,), float(value)),
        "head.weight": torch.zeros(1, 2),
        "head.bias": torch.tensor([float(value)]),
    }


def head_of(value: float) -> dict[str, torch.Tensor]:
    """A head that answers ``value``, whatever the body says."""
    return {"head.weight": torch.zeros(1, 2), "head.bias": torch.tensor([float(value)])}


def update_forever(root: Path, report: int) -> None:
    """Updates in turn: round n with a head that answers n + 0.5, then another head, n + 0.25, on
    the same body."""
    with (
        Registry(root) as registry,
        EdgeModelServer(config=ServingConfig(warmup_samples=1), registry=registry) as edge,
    ):
        while True:
            os.write(report, b".")
            number = len(registry.version_numbers("model"))
            if number % 2 == 0 or not edge.ready:
                edge.update_global(
                    state_of(number),
                    round=number,
                    head=head_of(number + 0.5),
                    output_type="regression",
                    **MLP,
                )
            else:
                edge.update_local(head_of(edge.predict([1.0, 1.0])["round"] + 0.25))


def check(root: Path, known: int) -> int:
    """The device starts with a whole model: weights, head and round of one update. Returns its
    version (0: none)."""
    with (
        Registry(root) as registry,
        EdgeModelServer(config=ServingConfig(warmup_samples=1), registry=registry) as edge,
    ):
        if not (version := registry.aliases("model").get("default", 0)):
            assert known == 0
            return 0
        assert version >= known, f"version {known} had answered, now {version} does"
        mine, generic = edge.predict([1.0, 1.0]), edge.predict([1.0, 1.0], use_personalized=False)
        body = generic["predictions"][0]
        assert mine["head"] == "own" and mine["predictions"][0] in (body + 0.5, body + 0.25), (
            mine,
            generic,
        )
        assert generic["round"] == mine["round"] == body and mine["model_version"] == str(version)
        return version


def main(root: Path, kills: int, seed: int) -> dict[str, int]:
    rng, known, update_s = random.Random(seed), 0, 0.02
    for _ in range(kills):
        reports, report = os.pipe()
        pid = fork(lambda report=report: update_forever(root, report))
        # its registry is open, it has made an update ...
        for _ in range(rng.choice((1, 2, 2, 3)) if known else 3):
            started_s = time.monotonic()
            os.read(reports, 1)
            update_s = 0.8 * update_s + 0.2 * (time.monotonic() - started_s)
        time.sleep(rng.uniform(0, 1.5 * update_s))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (
            f"the device ended: {status}"
        )
        os.close(reports)
        os.close(report)
        # checked in a child too: threads must not be alive across the next fork
        answer, told = os.pipe()
        checker = fork(lambda told=told, known=known: os.write(told, b"%d" % check(root, known)))
        assert os.waitpid(checker, 0)[1] == 0, "the device did not start again as it was"
        known = int(os.read(answer, 20))
        os.close(answer)
        os.close(told)
    return {"kills": kills, "updates": known, "seed": seed}


def start(root: Path, kills: int) -> dict[str, Any]:
    """Run it in a fresh process (for the tests)."""
    import budget  # here: the processes that are killed need no Hypothesis

    seed = budget.seed()
    done = subprocess.run(
        [sys.executable, __file__, str(root), str(kills), str(seed)],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
