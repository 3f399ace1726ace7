"""Check of the exercise "quantise, and prove it" (notebook 09): a version, four numbers and a
decision."""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flserving.extras import need
from flserving.federated.data import Client
from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge
from flserving.models.onnx import OnnxModel
from flserving.optimize import methods
from flserving.registry import Registry
from flserving.registry.manifest import Manifest

NAME = "digits"
KEYS = {"version", "smaller", "faster", "points", "worst_points", "serve"}
Prove = Callable[..., dict[str, Any]]


class World(NamedTuple):
    """Two versions, made up: who is right about which rows, and how long each call takes, in
    turns."""

    # before and after, of each client
    right: tuple[tuple[NDArray[np.bool_], ...], tuple[NDArray[np.bool_], ...]]
    us: tuple[NDArray[np.float64], NDArray[np.float64]]  # before and after, [turns, calls]
    budget: float

    @property
    def faster(self) -> float:
        before, after = (np.median(it, axis=1) for it in self.us)
        ratios = before / after
        return float(np.median(ratios))

    def accuracy(self, side: int) -> float:
        return 100 * float(np.concatenate(self.right[side]).mean())

    def clients(self, side: int) -> NDArray[np.float64]:
        return np.array([100 * it.mean() for it in self.right[side]])

    @property
    def points(self) -> float:
        return self.accuracy(1) - self.accuracy(0)

    @property
    def worst_points(self) -> float:
        return float(self.clients(1).min() - self.clients(0).min())

    @property
    def serve(self) -> bool:
        return self.faster > 1 and min(self.points, self.worst_points) >= -self.budget


class _Tried(NamedTuple):
    """What a proof did in one world."""

    world: World
    got: dict[str, Any]
    default: int
    manifests: dict[int, Manifest]


def check_proof(prove: Prove) -> None:
    """Check ``prove(registry, clients, answers, measure, budget)``.

    Right is: a static int8 version, its ranges from the clients' training rows, published without
    moving an alias; and a report whose numbers follow from the two files, from the held-out rows,
    and from the turns of ``measure``.

    Raises:
        CheckError: Recognises the usual mistakes by the numbers that they give.
        NotSupportedError: no onnx.
    """
    tried = functools.cache(lambda: [_try(prove, world) for world in worlds()])

    def each(check: Callable[[_Tried], object]) -> Callable[[Prove], None]:
        def of_all(_: Prove) -> None:
            for one in tried():
                check(one)

        return of_all

    judge(
        "quantise-and-prove",
        prove,
        Part(
            "a version of its own",
            each(_version),
            (
                'The version to start from is registry.resolve("digits", "default").',
                '`quantise(registry, "digits", before, "static", clients).version`, without an alias.',
            ),
        ),
        Part(
            "smaller",
            each(_smaller),
            ('`registry.manifest("digits", version).weights_nbytes`, before over after.',),
        ),
        Part(
            "faster",
            each(_faster),
            (
                "Ask `measure([before, after])` once: both versions in the same turns.",
                "`np.median(us, axis=1)` is one number for each turn; divide turn by turn, then take the median.",
            ),
        ),
        Part(
            "points of all rows",
            each(_points),
            (
                "`answers(version, client.test_x) == client.test_y` is true and false, for one client.",
                "`100 * np.concatenate(right).mean()` of all clients' arrays: every row counts alike.",
            ),
        ),
        Part(
            "points of the worst client",
            each(_worst_points),
            ("`100 * min(part.mean() for part in right)` of each version, after minus before.",),
        ),
        Part(
            "serve",
            each(lambda one: _check_serve(one.got["serve"], one.world)),
            ("`faster > 1`, and the smaller of the two changes is not below `-budget`.",),
        ),
    )


def _try(prove: Prove, world: World) -> _Tried:
    with _registry() as registry:
        got = _asked(registry, prove, world)
        manifests = {
            number: registry.manifest(NAME, number) for number in registry.version_numbers(NAME)
        }
        return _Tried(world, got, registry.resolve(NAME), manifests)


def _asked(registry: Registry, prove: Prove, world: World) -> dict[str, Any]:
    def answers(version: int | str, rows: NDArray[np.float32]) -> NDArray[np.int64]:
        """What each version says of a client's held-out rows; of any other row, the right class."""
        number = registry.resolve(NAME, version)
        for client, *sides in zip(clients(), *world.right, strict=True):
            if rows.shape == client.test_x.shape and np.array_equal(rows, client.test_x):
                return np.where(sides[number != 1], client.test_y, (client.test_y + 1) % 10)
        known = {}
        for client in clients():
            for row, y in zip(client.train_x, client.train_y, strict=True):
                known[row.tobytes()] = y
        assert all(row.tobytes() in known for row in rows), (
            "ask for the held-out rows (test_x) of one client at a time, as they are"
        )
        return np.array([known[row.tobytes()] for row in rows])

    def measure(versions: Sequence[int]) -> Mapping[int, NDArray[np.float64]]:
        numbers = [registry.resolve(NAME, it) for it in versions]
        assert len(set(numbers)) > 1, (
            f"measure was asked for {list(versions)}: time both versions, in the same turns"
        )
        taken = {}
        for version, number in zip(versions, numbers, strict=True):
            taken[version] = world.us[number != 1].copy()
        return taken

    got = ask("prove(...)", prove, registry, clients(), answers, measure, world.budget)
    assert isinstance(got, dict) and got.keys() == KEYS, (
        f"return a dict with the keys {', '.join(sorted(KEYS))}"
    )
    return got


def _smaller(tried: _Tried) -> None:
    made = max(tried.manifests)
    before = tried.manifests[1].weights_nbytes
    after = tried.manifests[made].weights_nbytes
    mistakes = {
        "that is the new file over the old one: 'times smaller' is the other way round": after
        / before,
        "that is the share that was saved, not how many times smaller the file is": 1
        - after / before,
        "this is a difference in bytes: divide": float(before - after),
    }
    _check_number("smaller", tried.got["smaller"], before / after, mistakes)


def _faster(tried: _Tried) -> None:
    _check_number("faster", tried.got["faster"], tried.world.faster, _times(tried.world))


def _points(tried: _Tried) -> None:
    _check_number("points", tried.got["points"], tried.world.points, _changes(tried.world))


def _worst_points(tried: _Tried) -> None:
    world = tried.world
    means = world.clients(1) - world.clients(0)
    lost_most = float(means.min())
    of_worst_before = float(means[world.clients(0).argmin()])
    mistakes = {
        "that is the client that LOST the most: compare the worst client before with the worst client after": lost_most,
        "that is one minus the other the wrong way round: a loss must be negative": -world.worst_points,
        "that is a share: in percentage points it is 100 times as much": world.worst_points / 100,
        "that is the change for the client that was worst before: another one may be the worst now": of_worst_before,
        "that is the change over all rows: take the worst client's": world.points,
    }
    _check_number("worst_points", tried.got["worst_points"], world.worst_points, mistakes)


def _times(world: World) -> dict[str, float]:
    before, after = world.us
    turns = np.median(before, axis=1) / np.median(after, axis=1)
    return {
        "that is the new time over the old one: 'times faster' is the other way round": 1
        / world.faster,
        "that is a ratio of means: one slow call in each turn decides it; take medians": before.mean()
        / after.mean(),
        "that is a ratio of means in each turn: one slow call decides it; take medians within the turn": float(
            np.median(before.mean(axis=1) / after.mean(axis=1))
        ),
        "that is one ratio over all turns: other load came and went, so compare within each turn, then take the "
        "median of the ratios": float(np.median(before) / np.median(after)),
        "that is the mean of the turns' ratios: one odd turn decides it; take their median": float(
            turns.mean()
        ),
        "that is the best turn: take a typical one": float(turns.max()),
        "that pairs single calls: take the median of each turn first": float(
            np.median(before / after)
        ),
    }


def _changes(world: World) -> dict[str, float]:
    of_clients = world.clients(1) - world.clients(0)
    before, after = (np.concatenate(right) for right in world.right)
    return {
        "that is the mean over the clients: they hold different numbers of rows, and all held-out rows count alike": (
            float(of_clients.mean())
        ),
        "that is one minus the other the wrong way round: a loss must be negative": -world.points,
        "that is a share: in percentage points it is 100 times as much": world.points / 100,
        "that is the accuracy itself: report how it changed": world.accuracy(1),
        "that was measured on training rows, or not at all: use the held-out rows": 0.0,
        "that is the agreement with the old version: agreeing with a wrong answer is no merit": (
            -100 * float((before != after).mean())
        ),
    }


def _check_number(key: str, got: Any, right: float, mistakes: Mapping[str, float]) -> None:
    assert isinstance(got, float | int | np.number) and not isinstance(got, bool), (
        f"{key} is {got!r}: give one number"
    )
    if np.isclose(got, right, rtol=1e-6, atol=1e-9):
        return
    for mistake, value in mistakes.items():
        assert not np.isclose(got, value, rtol=1e-6, atol=1e-9), f"{key} is {got:.4g}: {mistake}"
    raise AssertionError(f"{key} is {got:.4g}, and the two versions give {right:.4g}")


def _version(tried: _Tried) -> None:
    assert tried.default == 1, (
        f"default points to version {tried.default}: publish without an alias, nothing was proven yet"
    )
    version = tried.got["version"]
    assert not isinstance(version, Manifest), (
        "version is a whole manifest: return its number, manifest.version"
    )
    assert version in tried.manifests, f"version is {version!r}: the registry has no such version"
    assert version != 1, (
        "version is 1, the one that you started from: return the number of the quantised one"
    )
    made = tried.manifests[version]
    how = made.extra.get("optimisation")
    assert how == "quantised, static", (
        f'version {version} was made by {how!r}: use the method "static"'
    )
    seen = _digests()
    assert made.digests.weights != seen["held-out"], (
        "the ranges come from held-out rows: then these rows cannot judge the result any more; give the clients, whose "
        "training rows are used"
    )
    assert made.digests.weights == seen["train"], (
        "the ranges come from other rows than the clients': give all clients"
    )


def _check_serve(got: Any, world: World) -> None:
    assert isinstance(got, bool | np.bool_), f"serve is {got!r}: say True or False"
    if bool(got) == world.serve:
        return
    told = (
        f"{world.faster:.2f} times faster, {world.points:+.1f} points on all rows, {world.worst_points:+.1f} for the "
        f"worst client, budget {world.budget:g} points: serve is {got}"
    )
    assert not got or world.faster > 1, (
        f"{told}, but it is slower, and then there is nothing to win"
    )
    assert not got or world.points >= -world.budget, (
        f"{told}, but the accuracy fell by more than the budget"
    )
    assert not got, f"{told}, but the worst client pays for the others' speed"
    raise AssertionError(f"{told}, but it is faster and keeps the budget for everybody")


@functools.cache
def clients() -> tuple[Client, ...]:
    """Four clients, with few and with many held-out rows."""
    rng = np.random.default_rng(9)
    made = []
    for number, held_out in enumerate((10, 20, 40, 80)):
        x = rng.standard_normal((64 + held_out, 64)).astype(np.float32)
        y = rng.integers(0, 10, len(x))
        made.append(Client(f"client-{number}", x[:64], y[:64], x[64:], y[64:]))
    return tuple(made)


@functools.cache
def worlds() -> tuple[World, ...]:
    """To be served; slower; too many wrong answers; the worst client pays; and another client
    becomes the worst."""
    wrong = (  # wrong rows of each client, before and after
        ((2, 1, 4, 6), (1, 1, 5, 8)),
        ((2, 1, 4, 6), (2, 1, 5, 7)),
        ((2, 1, 4, 6), (2, 2, 7, 15)),
        ((2, 3, 4, 6), (3, 3, 3, 5)),
        ((3, 4, 4, 6), (2, 5, 4, 7)),
    )
    made = []
    for seed, (counts, faster) in enumerate(zip(wrong, (1.7, 0.8, 2.1, 3.0, 1.4), strict=True)):
        rng = np.random.default_rng(seed)
        # of the machine, in each turn
        load = rng.uniform(1, 4, (11, 1)) * rng.uniform(0.9, 1.15, (2, 11, 1))
        of_calls = rng.uniform(0.95, 1.05, (2, 11, 7))
        us = 100 * load * of_calls
        us[1] /= faster
        us[0, :, 3] *= 9
        us[1, ::3, 5] *= 30
        right = [_right(side) for side in counts]
        made.append(World((right[0], right[1]), (us[0], us[1]), 1.5))
    return tuple(made)


def _right(wrong: Sequence[int]) -> tuple[NDArray[np.bool_], ...]:
    right = []
    for client, count in zip(clients(), wrong, strict=True):
        rows = np.arange(len(client.test_y))
        right.append(rows >= count)
    return tuple(right)


@functools.cache
def _graph() -> bytes:
    """The version to quantise, an mlp 64-96-10. It is written down layer by layer: torch's exporter
    takes 6 s."""
    onnx = need("onnx", "onnx")
    rng = np.random.default_rng(9)
    weights = {
        "hidden": rng.uniform(-0.125, 0.125, (96, 64)).astype(np.float32),
        "hidden_bias": rng.uniform(-0.125, 0.125, 96).astype(np.float32),
        "head": rng.uniform(-0.1, 0.1, (10, 96)).astype(np.float32),
        "head_bias": rng.uniform(-0.1, 0.1, 10).astype(np.float32),
    }
    nodes = [
        onnx.helper.make_node("Gemm", ["rows", "hidden", "hidden_bias"], ["sums"], transB=1),
        onnx.helper.make_node("Relu", ["sums"], ["features"]),
        onnx.helper.make_node("Gemm", ["features", "head", "head_bias"], ["outputs"], transB=1),
    ]
    floats = onnx.TensorProto.FLOAT
    rows = onnx.helper.make_tensor_value_info("rows", floats, ["rows", 64])
    outputs = onnx.helper.make_tensor_value_info("outputs", floats, ["rows", 10])
    constants = [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = onnx.helper.make_graph(nodes, NAME, [rows], [outputs], constants)
    operators = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[operators], ir_version=10)
    written: bytes = model.SerializeToString(deterministic=True)
    return written


@contextmanager
def _registry() -> Iterator[Registry]:
    with tempfile.TemporaryDirectory() as folder, Registry(folder) as registry:
        model = OnnxModel.of(_graph(), 64, 10)
        registry.publish(
            NAME, model, architecture="onnx", parameters=model.parameters_of, alias="default"
        )
        yield registry


@functools.cache
def _digests() -> dict[str, str]:
    """What quantising gives: the same rows, the same bytes."""
    splits = {
        "train": [client.train_x for client in clients()],
        "held-out": [client.test_x for client in clients()],
    }
    digests = {}
    with _registry() as registry:
        for name, parts in splits.items():
            made = methods.quantise(registry, NAME, 1, "static", np.concatenate(parts))
            digests[name] = made.digests.weights
    return digests
