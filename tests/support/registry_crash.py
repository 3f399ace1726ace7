"""A process that forks publishers, and kills them or lets them race: run by the tests of the registry.

It imports torch once and forks from there, so that a kill costs milliseconds. The parent never holds a registry open,
nor a thread alive, across a fork. Prints one line of JSON.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from flserving.errors import NotFoundError
from flserving.models import weights
from flserving.registry import Registry, headfile, heads, index, manifest, registry, storage, validation
from flserving.registry.heads import HeadSet
from forked import fork

SIZES = [16, 32, 4]
BIG_SIZES = [256, 512, 4]  # half a megabyte: a longer write to be killed in
TRACED = {module.__file__ for module in (registry, storage, index, validation, weights, manifest, heads, headfile)}


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    """The weights that version ``seed`` must hold, whoever published it, however often it was tried."""
    rng, sizes = np.random.default_rng(seed), SIZES if seed % 2 else BIG_SIZES
    shapes = {
        "body.0.weight": (sizes[1], sizes[0]),
        "body.0.bias": (sizes[1],),
        "head.weight": (sizes[2], sizes[1]),
        "head.bias": (sizes[2],),
    }
    return {name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}


def heads_of(seed: int) -> HeadSet | None:
    """The personal heads that version ``seed`` must hold: every other one has none."""
    if seed % 2:
        return None
    rng = np.random.default_rng(seed)
    return HeadSet("head", [f"{seed}-{i}" for i in range(50)], rng.random((50, BIG_SIZES[1] + 1, 4), np.float32))


def publish_next(opened: Registry) -> None:
    seed = len(opened.version_numbers("m")) + 1
    opened.publish(
        "m",
        tensors_of(seed),
        architecture="mlp",
        parameters={"sizes": SIZES if seed % 2 else BIG_SIZES},
        lineage={"round": seed},
        heads=heads_of(seed),
        alias="latest",
    )


def check(root: Path, known: int) -> int:
    """Every visible version is whole and is what its seed says; returns how many there are."""
    with Registry(root) as opened:
        numbers = opened.version_numbers("m")
        assert numbers == list(range(1, len(numbers) + 1)), f"gaps: {numbers}"
        assert len(numbers) >= known, f"{known} versions were visible, now {len(numbers)}"
        assert opened.aliases("m") == ({"latest": numbers[-1]} if numbers else {}), "alias and version came apart"
        for number in numbers[known:]:
            artifact, expected = opened.read("m", number), tensors_of(number)
            assert artifact.manifest.lineage is not None and artifact.manifest.lineage.round == number
            assert artifact.tensors.keys() == expected.keys()
            assert all(torch.equal(artifact.tensors[name], expected[name]) for name in expected), f"version {number}"
            if (promised := heads_of(number)) is None:
                assert artifact.heads is None
            else:
                assert artifact.heads is not None
                slots = np.array([artifact.heads.find(client) for client in promised.clients])
                assert torch.equal(artifact.heads.gather(slots), torch.from_numpy(promised.weights)), f"heads {number}"
        assert len(os.listdir(root / "staging")) <= 1, "leftovers of the dead were not removed"
        return len(numbers)


def random_instants(root: Path, kills: int, seed: int) -> dict[str, int]:
    """Publish in a loop, be killed at a random instant of a random turn, again and again on one registry.

    The publisher reports over a pipe when it has opened the registry and after every publish, so that the kills hit
    publishes on a fast machine and on a loaded one.
    """
    rng, known, interrupted, publish_s = random.Random(seed), 0, 0, 0.005

    def publish_forever(report: int) -> None:
        with Registry(root) as opened:
            while True:
                os.write(report, b".")
                publish_next(opened)

    for _ in range(kills):
        reports, report = os.pipe()
        pid = fork(lambda report=report: publish_forever(report))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2))):
            started = time.monotonic()
            os.read(reports, 1)
            publish_s = 0.8 * publish_s + 0.2 * (time.monotonic() - started)
        time.sleep(rng.uniform(0, 1.5 * publish_s))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the publisher ended: {status}"
        os.close(reports)
        os.close(report)
        staging = root / "staging"
        interrupted += staging.is_dir() and any(entry.is_dir() for entry in staging.iterdir())
        known = check(root, known)
    check(root, 0)
    return {"kills": kills, "interrupted": interrupted, "versions": known}


def every_line(root: Path, step: int) -> dict[str, int]:
    """Be killed at the first line of a first publish, the next time at the second line, ... until it gets through."""
    visible = {0: 0, 1: 0}
    for line in range(1, 1_000_000, step):
        folder, left = root / str(line), line

        def killer(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in TRACED:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return killer

        def publish_once(folder: Path = folder) -> None:
            sys.settrace(killer)
            with Registry(folder) as opened:
                publish_next(opened)

        status = os.waitpid(fork(publish_once), 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return {"lines": line, "before": visible[0], "after": visible[1]}
        known = check(folder, 0)
        visible[known] += 1
        with Registry(folder) as opened:  # the next publisher takes the next number, whatever lies there
            publish_next(opened)
        assert check(folder, 0) == known + 1
    raise AssertionError("the publish never came to an end")


def open_together(root: Path, workers: int, turns: int) -> dict[str, Any]:
    """Several processes open a new registry at the same instant, again and again."""
    for turn in range(turns):
        gate = os.pipe()

        def work(gate: tuple[int, int] = gate, turn: int = turn) -> None:
            os.close(gate[1])
            os.read(gate[0], 1)
            Registry(root / str(turn)).close()

        pids = [fork(work) for _ in range(workers)]
        os.close(gate[0])
        os.close(gate[1])
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * workers, f"turn {turn}"
    return {"turns": turns}


def together(root: Path, workers: int, turns: int) -> dict[str, Any]:
    """Several processes open one registry at the same instant, publish and move the same alias."""
    gate = os.pipe()

    def work(worker: int) -> None:
        os.close(gate[1])
        os.read(gate[0], 1)  # until the parent closes the other end: all start at once, the first opening included
        mine = []
        with Registry(root) as opened:
            for turn in range(turns):
                note = f"{worker}/{turn}"
                published = opened.publish(
                    "m",
                    tensors_of(1 + 2 * (worker * turns + turn)),
                    architecture="mlp",
                    parameters={"sizes": SIZES},
                    note=note,
                    alias=f"worker-{worker}",
                )
                mine.append([published.version, note, published.digests.weights])
                opened.set_alias("m", "default", published.version, who=f"worker {worker}", why=note)
                if turn % 3 == 0:
                    with contextlib.suppress(NotFoundError):
                        opened.rollback("m", who=f"worker {worker}", why="back")
        root.with_name(f"{worker}.json").write_text(json.dumps(mine))

    pids = [fork(lambda worker=worker: work(worker)) for worker in range(workers)]
    os.close(gate[0])
    os.close(gate[1])
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * workers
    return {
        "published": [json.loads(root.with_name(f"{worker}.json").read_text()) for worker in range(workers)],
        "heavy modules": [name for name in ("pandas", "sklearn", "matplotlib", "ipywidgets") if name in sys.modules],
    }


MODES = {"random": random_instants, "lines": every_line, "together": together, "open": open_together}


def start(mode: str, root: Path, *numbers: int) -> dict[str, Any]:
    """Run one mode in a fresh process (for the tests)."""
    done = subprocess.run(
        [sys.executable, __file__, mode, str(root), *map(str, numbers)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, Registry(scratch) as warm:  # forks start from a warm process
        publish_next(warm)
        warm.read("m", 1)
    print(json.dumps(MODES[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))))
