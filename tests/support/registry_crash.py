"""A process that forks publishers, and kills them or lets them race: run by the tests of the
registry.

It imports torch once and forks from there, so that a kill costs milliseconds. The parent never
holds a registry open, nor a thread alive, across a fork. Prints one line of JSON.
"""

import contextlib
import json
import os
import random
import shutil
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

from byte_search import search
from flserving.errors import FlservingError, NotFoundError
from flserving.models import weights
from flserving.registry import (
    Registry,
    forget,
    headfile,
    heads,
    index,
    manifest,
    registry,
    storage,
    validation,
)
from flserving.registry.heads import HeadSet
from forked import fork

SIZES = [16, 32, 4]
BIG_SIZES = [256, 512, 4]  # half a megabyte: a longer write to be killed in
MODULES = (registry, storage, index, validation, weights, manifest, heads, headfile, forget)
TRACED = {module.__file__ for module in MODULES}


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    """The weights that version ``seed`` must hold, whoever published it, however often it was
    tried."""
    rng, sizes = np.random.default_rng(seed), SIZES if seed % 2 else BIG_SIZES
    shapes = {
        "body.0.weight": (sizes[1], sizes[0]),
        "body.0.bias": (sizes[1],),
        "head.weight": (sizes[2], sizes[1]),
        "head.bias": (sizes[2],),
    }
    return {
        name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        for name, shape in shapes.items()
    }


def heads_of(seed: int) -> HeadSet | None:
    """The personal heads that version ``seed`` must hold: every other one has none."""
    if seed % 2:
        return None
    rng = np.random.default_rng(seed)
    return HeadSet(
        "head",
        [f"{seed}-{i}" for i in range(50)],
        rng.random((50, BIG_SIZES[1] + 1, 4), np.float32),
    )


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
        assert opened.aliases("m") == ({"latest": numbers[-1]} if numbers else {}), (
            "alias and version came apart"
        )
        for number in numbers[known:]:
            artifact, expected = opened.read("m", number), tensors_of(number)
            assert (
                artifact.manifest.lineage is not None and artifact.manifest.lineage.round == number
            )
            assert artifact.tensors.keys() == expected.keys()
            assert all(torch.equal(artifact.tensors[name], expected[name]) for name in expected), (
                f"version {number}"
            )
            if (promised := heads_of(number)) is None:
                assert artifact.heads is None
            else:
                assert artifact.heads is not None
                slots = np.array([artifact.heads.find(client) for client in promised.clients])
                assert np.array_equal(artifact.heads.gather(slots), promised.weights), (
                    f"heads {number}"
                )
        assert len(os.listdir(root / "staging")) <= 1, "leftovers of the dead were not removed"
        return len(numbers)


def random_instants(root: Path, kills: int, seed: int) -> dict[str, int]:
    """Publish in a loop, be killed at a random instant of a random turn, again and again on one
    registry.

    The publisher reports over a pipe when it has opened the registry and after every publish, so
    that the kills hit publishes on a fast machine and on a loaded one.
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
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (
            f"the publisher ended: {status}"
        )
        os.close(reports)
        os.close(report)
        staging = root / "staging"
        interrupted += staging.is_dir() and any(entry.is_dir() for entry in staging.iterdir())
        known = check(root, known)
    check(root, 0)
    return {"kills": kills, "interrupted": interrupted, "versions": known}


def killer_at(line: int) -> Any:
    """A trace function that kills this process at so many lines of the registry's code from now."""
    left = line

    def killer(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return killer

    return killer


def every_line(root: Path, step: int) -> dict[str, int]:
    """Be killed at the first line of a first publish, the next time at the second line, ... until
    it gets through."""
    visible = {0: 0, 1: 0}
    for line in range(1, 1_000_000, step):
        folder = root / str(line)

        def publish_once(folder: Path = folder, line: int = line) -> None:
            sys.settrace(killer_at(line))
            with Registry(folder) as opened:
                publish_next(opened)

        status = os.waitpid(fork(publish_once), 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return {"lines": line, "before": visible[0], "after": visible[1]}
        known = check(folder, 0)
        visible[known] += 1
        # the next publisher takes the next number, whatever lies there
        with Registry(folder) as opened:
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
        # until the parent closes the other end: all start at once, the first opening included
        os.read(gate[0], 1)
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
                opened.set_alias(
                    "m", "default", published.version, who=f"worker {worker}", why=note
                )
                if turn % 3 == 0:
                    with contextlib.suppress(NotFoundError):
                        opened.rollback("m", who=f"worker {worker}", why="back")
        root.with_name(f"{worker}.json").write_text(json.dumps(mine))

    pids = [fork(lambda worker=worker: work(worker)) for worker in range(workers)]
    os.close(gate[0])
    os.close(gate[1])
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * workers
    return {
        "published": [
            json.loads(root.with_name(f"{worker}.json").read_text()) for worker in range(workers)
        ],
        "heavy modules": [
            name
            for name in ("pandas", "sklearn", "matplotlib", "ipywidgets")
            if name in sys.modules
        ],
    }


GONE = "forget-me"


def publish_named(opened: Registry, *clients: str) -> None:
    seed = 1 + 2 * len(opened.version_numbers("m"))
    weights = np.random.default_rng(seed).random((len(clients), SIZES[1] + 1, SIZES[2]), np.float32)
    opened.publish(
        "m",
        tensors_of(seed),
        architecture="mlp",
        parameters={"sizes": SIZES},
        lineage={"round": seed, "clients": clients, "sample_counts": [1] * len(clients)},
        note=f"{clients[0]} rejected: never",
        heads=HeadSet("head", clients, weights),
        alias="latest",
        who=clients[0],
    )


def rounds_with(opened: Registry, client: str) -> list[int]:
    """The versions that have a head of the client; each is whole, and says of its clients what it
    holds."""
    found = []
    for number in opened.version_numbers("m"):
        artifact = opened.read("m", number)
        assert (
            artifact.manifest.lineage is not None and artifact.manifest.lineage.clients is not None
        )
        listed = artifact.manifest.lineage.clients
        stored = (
            []
            if artifact.heads is None
            else [one for one in listed if artifact.heads.take(one) is not None]
        )
        assert stored == list(listed) and len(listed) == (
            0 if artifact.heads is None else artifact.heads.num_heads
        )
        found += [number] * (client in listed)
    return found


def forget_at_every_line(root: Path, step: int) -> dict[str, int]:
    """Be killed at the first line of a forgetting, the next time at a later one, ... until it gets
    through."""
    template = root / "template"
    with Registry(template) as opened:
        for clients in ((GONE, "b", "c"), ("b", GONE), (GONE,), ("b", "c")):
            publish_named(opened, *clients)
    seen = {True: 0, False: 0}
    for line in range(1, 1_000_000, step):
        folder = root / str(line)
        shutil.copytree(template, folder)

        def forget_once(folder: Path = folder, line: int = line) -> None:
            with Registry(folder) as opened:
                sys.settrace(killer_at(line))
                opened.forget(GONE)
                sys.settrace(None)

        status = os.waitpid(fork(forget_once), 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and search(folder, GONE) == set()
            return {"lines": line, "before": seen[True], "after": seen[False]}
        with Registry(folder) as opened:
            there = rounds_with(opened, GONE)
            assert there in ([1, 2, 3], []), f"line {line}: half forgotten, versions {there}"
            assert len(opened.forget_log()) == (not there), (
                f"line {line}: log and versions came apart"
            )
            seen[bool(there)] += 1
            found = opened.forget(GONE)
            assert found.learned == {"m": [1, 3, 5]} and found.heads == {"m": [1, 2, 3]}, found
            assert rounds_with(opened, GONE) == [] and rounds_with(opened, "b") == [1, 2, 4]
            assert search(folder, GONE) == set(), f"line {line}: {search(folder, GONE)}"
        shutil.rmtree(folder)
    raise AssertionError("it never came to an end")


def forget_until_all_is_gone(registry: Registry, client: str) -> None:
    """As the error says that comes where a reader keeps the log of the database from being cut."""
    while True:
        try:
            registry.forget(client)
            return
        except FlservingError as error:
            if not str(error).endswith("forget again"):
                raise


def forget_together(root: Path, readers: int, turns: int) -> dict[str, Any]:
    """Two processes forget a client after the other, one publishes, the others read: every version
    is whole at any moment, and nobody comes back."""
    folder = root / "registry"
    names = [f"client-{turn:03d}" for turn in range(2 * turns)]
    with Registry(folder) as opened:
        publish_named(opened, "first", *names)
        publish_named(opened, *names, "last")

    def work(worker: int) -> None:
        with Registry(folder) as opened:
            for name in names[worker::2]:
                forget_until_all_is_gone(opened, name)

    def publish() -> None:
        with Registry(folder) as opened:
            for _ in range(turns):
                publish_named(opened, "first", "last")

    def read(reports: Path) -> None:
        reads = 0
        with Registry(folder) as opened:
            while not (root / "stop").exists():
                rounds_with(opened, "first")
                reads += 1
        reports.write_text(str(reads))

    reading = [fork(lambda n=n: read(root / f"{n}.reads")) for n in range(readers)]
    writing = [fork(lambda: work(0)), fork(lambda: work(1)), fork(publish)]
    ended = [os.waitpid(pid, 0)[1] for pid in writing]
    (root / "stop").touch()
    assert [os.waitpid(pid, 0)[1] for pid in reading] == [0] * readers
    assert ended == [0, 0, 0]
    with Registry(folder) as opened:
        assert [rounds_with(opened, name) for name in names] == [[]] * len(names)
        assert (
            rounds_with(opened, "first")[0] == 1 and len(opened.version_numbers("m")) == 2 + turns
        )
        assert not any(search(folder, name) for name in names)
        forgotten = len(opened.forget_log())
    return {
        "reads": sum(int((root / f"{n}.reads").read_text()) for n in range(readers)),
        "forgotten": forgotten,
    }


MODES = {
    "random": random_instants,
    "lines": every_line,
    "together": together,
    "open": open_together,
    "forget": forget_at_every_line,
    "forget_together": forget_together,
}


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
    # one publishes at a time: what is there then, the killed one left
    if sys.argv[1] in ("random", "lines"):
        storage.LEFT_AFTER_S = 0.0
    # forks start from a warm process
    with tempfile.TemporaryDirectory() as scratch, Registry(scratch) as warm:
        publish_next(warm)
        warm.read("m", 1)
    print(json.dumps(MODES[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))))
