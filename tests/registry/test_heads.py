"""The file of personal heads and its store: what was published is what is gathered, and nothing
else ever is."""

import errno
import os
import time
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budget import examples
from flserving import models
from flserving.errors import CorruptArtifactError, FlservingError, InvalidModelError
from flserving.registry import Registry, storage
from flserving.registry.headfile import checksums, stride
from flserving.registry.heads import (
    EXPIRED,
    STALE,
    UNKNOWN,
    HeadSet,
    HeadStore,
    neutral_head,
    trained_on,
    trained_on_state,
)
from flserving.registry.manifest import decode, encode
from serving_models import Threads

HERE, ELSEWHERE = "a" * 64, "b" * 64
SIZES = [4, 6, 3]
MODEL = {"architecture": "mlp", "parameters": {"sizes": SIZES}}


def numbers(count, inputs=6, outputs=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, inputs + 1, outputs), np.float32)


def names(count):
    return [f"client-{number}" for number in range(count)]


def opened(folder, heads, digest=HERE, budget=1 << 20):
    """A store of these heads, published by hand. Neutral: all 7."""
    path = Path(folder) / "heads.bin"
    path.unlink(missing_ok=True)
    entry = heads.write(str(path), digest)
    store = HeadStore(
        str(folder), "heads.bin", entry, digest, np.full(heads.weights.shape[1:], np.float32(7))
    )
    store.resize(budget)
    return store


def slots_of(store, clients):
    return np.array([store.find(client) for client in clients])


# What comes back


@examples(60)
@given(
    count=st.integers(1, 40), inputs=st.integers(1, 9), outputs=st.integers(1, 5),
    budget=st.sampled_from([1, 300, 1500, 1 << 20]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_batch_gets_its_own_heads_whatever_is_in_memory(
    tmp_path_factory, count, inputs, outputs, budget, seed
):
    """Order, repeats, unknown clients, a memory for one head or for all: always the published
    numbers, to the bit."""
    heads, rng = (
        HeadSet("head", names(count), numbers(count, inputs, outputs, seed)),
        np.random.default_rng(seed),
    )
    store = opened(tmp_path_factory.mktemp("heads"), heads, budget=budget)
    for _ in range(8):
        chosen = rng.integers(-1, count, size=rng.integers(1, 60))
        got = store.gather(slots_of(store, [f"client-{number}" for number in chosen]))
        expected = np.where(chosen[:, None, None] < 0, np.float32(7), heads.weights[chosen])
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    "client", ["", "client-", "client-40", "CLIENT-0", "client-0 ", "\udc80", "x" * 10**6, "\0"]
)
def test_who_is_not_there_is_unknown(tmp_path, client):
    store = opened(tmp_path, HeadSet("head", names(40), numbers(40)))
    assert store.find(client) == UNKNOWN and store.take(client) is None


def test_any_text_may_name_a_client(tmp_path):
    clients = ["ä", "a" * 256, "😀", "\udc80", "../x", "client\n", "0"]
    heads = HeadSet("head", clients, numbers(len(clients)))
    store = opened(tmp_path, heads)
    assert np.array_equal(store.gather(slots_of(store, clients)), heads.weights)


def test_a_head_trained_on_something_else_is_stale_and_never_gathered(tmp_path):
    heads = HeadSet("head", names(4), numbers(4), [HERE, ELSEWHERE, HERE, ELSEWHERE])
    store = opened(tmp_path, heads)
    slots = slots_of(store, names(4))
    assert [slot if slot < 0 else "own" for slot in slots] == ["own", STALE, "own", STALE]
    assert (store.gather(slots)[1::2] == 7).all()
    assert np.array_equal(store.gather(slots)[::2], heads.weights[::2])


def test_one_head_is_taken_out_with_what_it_was_trained_on(tmp_path):
    heads = HeadSet("adapter", names(3), numbers(3, 3, 3), [HERE, ELSEWHERE, HERE])
    (tmp_path / "first").mkdir()
    alone = opened(tmp_path / "first", heads).take("client-1")
    assert (alone.layout, list(alone.clients), alone.trained_on) == (
        "adapter",
        ["client-1"],
        [ELSEWHERE],
    )
    again = opened(tmp_path, alone)
    assert again.find("client-1") == STALE and np.array_equal(
        again.take("client-1").weights, heads.weights[1:2]
    )


def test_the_neutral_head_changes_no_answer():
    """For a head alone the generic one, for what is added zeros, for what comes after the logits
    the identity."""
    weights, bias = torch.arange(15.0).reshape(3, 5), torch.tensor([1.0, 2.0, 3.0])
    generic, body = (
        {"head.weight": weights, "head.bias": bias},
        torch.linspace(-1, 1, 35).reshape(7, 5),
    )
    logits = body @ weights.T + bias
    for layout in ("head", "additive", "adapter"):
        head = torch.from_numpy(neutral_head(layout, generic))
        inputs = logits if layout == "adapter" else body
        answers = inputs @ head[:-1] + head[-1] + (logits if layout == "additive" else 0)
        assert head.dtype == torch.float32 and torch.allclose(answers, logits, atol=1e-4), layout


@pytest.mark.parametrize("budget", [1, 1 << 20], ids=["no room", "room"])
def test_who_has_no_head_now_gets_nobody_elses(tmp_path, budget):
    """The slots that mean so count from the end of the memory in which the heads of others lie."""
    store = opened(tmp_path, HeadSet("head", names(3), numbers(3)), budget=budget)
    store.gather(slots_of(store, names(3)))  # all are in memory
    assert (store.gather(np.array([UNKNOWN, STALE, EXPIRED])) == 7).all()


@pytest.mark.parametrize("budget", [1, 1 << 20], ids=["no room", "room"])
def test_the_size_of_a_store_is_known_from_its_manifest(tmp_path, budget):
    heads = HeadSet("head", names(20), numbers(20))
    entry = heads.write(str(tmp_path / "heads.bin"), HERE)
    store = HeadStore(str(tmp_path), "heads.bin", entry, HERE, np.zeros((7, 3), np.float32))
    store.resize(budget)
    assert HeadStore.nbytes_of(entry, budget) == store.nbytes > 0


def test_equal_heads_give_equal_files_and_the_digest_tells_others_apart(tmp_path):
    weights = numbers(5)
    first = opened(tmp_path, HeadSet("head", names(5), weights)).digest
    backwards = HeadSet("head", names(5)[::-1], weights[::-1])
    assert opened(tmp_path, backwards).digest == first
    weights[3, 2, 1] = np.nextafter(weights[3, 2, 1], np.float32(9))
    assert opened(tmp_path, HeadSet("head", names(5), weights)).digest != first
    assert opened(tmp_path, HeadSet("additive", names(5), numbers(5))).digest != first


def test_state_dicts_become_heads():
    layer = torch.nn.Linear(6, 3)
    heads = HeadSet.from_states({"a": {"head.weight": layer.weight, "head.bias": layer.bias}})
    x = torch.randn(5, 6)
    matrix = torch.from_numpy(heads.weights[0])
    torch.testing.assert_close(x @ matrix[:-1] + matrix[-1], layer(x))
    assert (HeadSet.from_states({"a": {"head.weight": layer.weight}}).weights[0, -1] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tail", ["a"], numbers(1)), "layout is 'tail'"),
        (("head", ["a"], numbers(2)), "1 clients, 2 heads"),
        (("head", ["a", "b", "a"], numbers(3)), "'a' has two heads"),
        (("head", ["a"], numbers(1).astype(np.float64)), "float64"),
        (("head", [], numbers(0)), r"float32 \(0, 7, 3\)"),
        (("head", ["a"], numbers(1)[0]), r"\(7, 3\)"),
        (("head", ["a"], numbers(1)[:, :1]), r"\(1, 1, 3\)"),
        (("adapter", ["a"], numbers(1)), "adapters are"),
        (("head", [""], numbers(1)), "1 to 256 characters"),
        (("head", ["x" * 257], numbers(1)), "1 to 256 characters"),
        (("head", [3], numbers(1)), "client 3"),
        (("head", ["a"], numbers(1), "xyz"), "give a sha256"),
        (("head", ["a", "b", "c"], numbers(3), [HERE, HERE]), "2 entries"),
    ],
    ids=range(13),
)
def test_what_cannot_be_heads_is_refused(arguments, message):
    with pytest.raises(InvalidModelError, match=message):
        HeadSet(*arguments)


@pytest.mark.parametrize(
    "states",
    [{}, {"a": {}}, {"a": {"head.weight": 3}}, {"a": {"head.weight": torch.ones(3)}},
     {"a": {"head.weight": torch.ones(3, 6)}, "b": {"head.weight": torch.ones(3, 5)}}],
    ids=range(5),
)  # fmt: skip
def test_states_that_are_no_heads_are_refused(states):
    with pytest.raises(InvalidModelError, match=r"do not fit together|are float32"):
        HeadSet.from_states(states)
    with pytest.raises(InvalidModelError, match=r"^layout is 'tail': choose"):
        HeadSet.from_states({"a": {"head.weight": torch.ones(3, 6)}}, layout="tail")


# Memory


@pytest.mark.parametrize(
    ("budget", "expected"), [(403 * 129, 100), (403 * 129 - 1, 300)], ids=["all fit", "they do not"]
)
def test_heads_are_read_once_where_all_fit_and_each_time_where_they_do_not(
    tmp_path, monkeypatch, budget, expected
):
    store = opened(tmp_path, HeadSet("head", names(400), numbers(400)), budget=budget)
    reads = []
    read_at = storage.read_at
    monkeypatch.setattr(
        storage, "read_at", lambda fd, nbytes, at: reads.append(at) or read_at(fd, nbytes, at)
    )
    for _ in range(3):
        store.gather(np.arange(100))
    assert len(reads) == expected


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_a_client_may_come_twice_in_a_batch(tmp_path, budget):
    store = opened(tmp_path, HeadSet("head", names(20), numbers(20)), budget=budget)
    for turn in range(30):
        slots = np.array([turn % 20, (turn + 1) % 20, UNKNOWN] * 4)
        assert np.array_equal(store.gather(slots), np.tile(store.gather(slots[:3]), (4, 1, 1)))


@pytest.mark.parametrize("budget", [20 * 128, 1 << 20], ids=["no room", "room"])
def test_threads_share_one_store(tmp_path, budget):
    heads, threads = HeadSet("head", names(300), numbers(300)), Threads()
    store = opened(tmp_path, heads, budget=budget)
    weights = {store.find(name): heads.weights[i] for i, name in enumerate(names(300))}

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(200):
            slots = rng.integers(300, size=rng.integers(1, 40))
            assert np.array_equal(store.gather(slots), [weights[slot] for slot in slots])

    for seed in range(6):
        threads.start(work, seed)
    threads.results()


def anonymous_nbytes():
    """This process's own memory now, without mapped files. (Its peak would hide what stays below an
    earlier one.)"""
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("RssAnon")
        )
        * 1024
    )


def random_ids(tmp_path, count):
    """Bytes of objects that stay when so many strangers have asked."""
    store = opened(tmp_path, HeadSet("head", names(1000), numbers(1000)))
    tracemalloc.start()
    try:
        assert all(store.find(os.urandom(8).hex()) == UNKNOWN for _ in range(count))
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_strangers_leave_no_trace_in_memory(tmp_path):
    assert random_ids(tmp_path, 100_000) < 1 << 16


@pytest.mark.slow
def test_a_million_strangers_leave_no_trace_in_memory(tmp_path):
    assert random_ids(tmp_path, 1_000_000) < 1 << 16


def many(tmp_path, count):
    """Publish so many heads from a memory map, open them under a budget of 2 % of them, use 10,000
    at random."""
    weights = np.lib.format.open_memmap(tmp_path / "all.npy", "w+", np.float32, (count, 65, 10))
    for start in range(0, count, 10_000):
        weights[start : start + 10_000] = np.arange(start, min(start + 10_000, count))[
            :, None, None
        ]
    with Registry(tmp_path / "registry", max_artifact_bytes=4 << 30) as registry:
        heads = HeadSet("head", names(count), weights)
        registry.publish("m", models.build("digits_mlp"), architecture="digits_mlp", heads=heads)
        began = time.perf_counter()
        store = registry.read("m", 1).heads
        opened_s = time.perf_counter() - began
        store.resize(count * 2624 // 50)
        before, most = anonymous_nbytes(), store.nbytes
        rng = np.random.default_rng(0)
        for _ in range(100):
            chosen = rng.integers(count, size=100)
            got = store.gather(slots_of(store, [f"client-{number}" for number in chosen]))
            assert (got == chosen[:, None, None]).all()
        grown = anonymous_nbytes() - before
        assert most < 40 * count + 10_000 and grown < 8 << 20
    return opened_s


def test_twenty_thousand_heads_in_a_file(tmp_path):
    many(tmp_path, 20_000)


@pytest.mark.slow
def test_a_million_heads_open_in_under_a_second(tmp_path):
    assert many(tmp_path, 1_000_000) < 1


def test_a_forgotten_store_closes_its_file(tmp_path):
    store = opened(tmp_path, HeadSet("head", names(3), numbers(3)))
    fd = store._file._fd
    os.fstat(fd)
    del store
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_disk_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    def broken(fd, nbytes, at):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = opened(tmp_path, HeadSet("head", names(3), numbers(3)))
    monkeypatch.setattr(storage, "read_at", broken)
    with pytest.raises(CorruptArtifactError, match="cannot be read"):
        store.gather(np.array([0]))


# Damaged and hostile files


def damaged(folder, change):
    """Publish, change the bytes, open, and use every head."""
    heads = HeadSet("head", names(20), numbers(20))
    path = Path(folder) / "heads.bin"
    path.unlink(missing_ok=True)
    entry = heads.write(str(path), HERE)
    entry = change(path, entry) or entry
    store = HeadStore(str(folder), "heads.bin", entry, HERE, np.zeros((7, 3), np.float32))
    for start in range(0, 20, 5):
        store.gather(np.arange(start, start + 5))
    return store


def put(at, data):
    def change(path, _):
        content = bytearray(path.read_bytes())
        content[at : at + len(data)] = data
        path.write_bytes(content)

    return change


def test_every_flipped_byte_is_found(tmp_path):
    damaged(tmp_path, lambda path, entry: None)
    content = (tmp_path / "heads.bin").read_bytes()
    for at in [*range(0, 64, 5), *range(64, len(content), 37), len(content) - 1]:
        with pytest.raises(CorruptArtifactError, match=r"heads\.bin"):
            damaged(tmp_path, put(at, bytes([content[at] ^ 0x80])))
            pytest.fail(f"byte {at}")


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000, 2600, -1, -32, -33])
def test_a_truncated_file_is_refused(tmp_path, length):
    with pytest.raises(CorruptArtifactError, match="expected"):
        damaged(
            tmp_path,
            lambda path, entry: os.truncate(path, length if length >= 0 else entry.nbytes + length),
        )


def test_a_file_truncated_while_it_is_open_is_an_error_and_no_signal(tmp_path):
    store = opened(tmp_path, HeadSet("head", names(20), numbers(20)), budget=1)
    os.truncate(tmp_path / "heads.bin", 64 + 128)
    assert np.isfinite(store.gather(np.array([0]))).all()
    with pytest.raises(CorruptArtifactError, match="truncated"):
        store.gather(np.array([0, 19]))


@pytest.mark.parametrize(
    "changes",
    [{"num_heads": 19}, {"num_heads": 21}, {"num_heads": 1 << 26}, {"inputs": 5}, {"inputs": 1 << 20},
     {"outputs": 1, "inputs": 20}, {"nbytes": 1}, {"nbytes": 1 << 40}, {"layout": "additive"},
     {"index_sha256": HERE}, {"num_heads": 1 << 26, "outputs": 1 << 20, "inputs": 1 << 20, "nbytes": 1 << 62}],
    ids=range(11),
)  # fmt: skip
def test_a_manifest_that_tells_another_story_is_refused_before_memory_is_taken(tmp_path, changes):
    with pytest.raises(CorruptArtifactError, match=r"heads\.bin"):
        damaged(tmp_path, lambda path, entry: msgspec.structs.replace(entry, **changes))


@pytest.mark.parametrize("kind", ["symlink", "folder", "fifo", "missing"])
def test_only_a_regular_file_is_opened(tmp_path, kind):
    def change(path, entry):
        path.rename(tmp_path / "elsewhere")
        make = {"symlink": lambda: path.symlink_to(tmp_path / "elsewhere"), "folder": path.mkdir,
                "fifo": lambda: os.mkfifo(path), "missing": lambda: None}  # fmt: skip
        make[kind]()

    with pytest.raises(CorruptArtifactError, match=r"heads\.bin"):
        damaged(tmp_path, change)


def test_a_damaged_head_fails_its_client_and_no_other(tmp_path):
    store = opened(tmp_path, HeadSet("head", names(20), numbers(20)), budget=1)
    put(64 + 128 * 7 + 50, b"\xff")(tmp_path / "heads.bin", None)
    with pytest.raises(CorruptArtifactError, match="number 7"):
        store.gather(np.arange(5, 9))
    assert np.array_equal(store.gather(np.array([6, 8])), store.gather(np.array([8, 6]))[::-1])


@examples(200)
@given(st.lists(st.integers(0, 703), min_size=1, max_size=6, unique=True), st.integers(0, 99))
def test_the_checksum_sees_every_few_flipped_bits(bits, seed):
    """A pair of sign bits is what a sum modulo 2**64 alone would miss."""
    record = numbers(1, 6, 3, seed).reshape(1, -1)[:, :21]
    record = np.concatenate([record, np.zeros((1, 1), np.float32)], axis=1)
    changed = record.copy()
    for bit in bits:
        changed.view(np.uint8)[0, bit // 8] ^= 1 << bit % 8
    assert checksums(record) != checksums(changed)


def test_two_flipped_signs_are_seen():
    record = numbers(1, 31, 16).reshape(1, -1)
    for first in range(1, 64, 2):
        changed = record.copy()
        changed[0, [first, first + 100]] *= -1
        assert checksums(record) != checksums(changed)


# In the registry


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as opened:
        yield opened


def publish(registry, **options):
    torch.manual_seed(0)
    return registry.publish("m", models.build("mlp", {"sizes": SIZES}), **MODEL, **options)


def test_heads_are_part_of_a_version_and_change_none_of_its_digests(registry):
    heads = HeadSet("head", names(9), numbers(9))
    bare, dressed = publish(registry), publish(registry, heads=heads)
    assert bare.digests == dressed.digests and bare.heads is None
    assert (dressed.heads.layout, dressed.heads.num_heads, dressed.heads.inputs, dressed.heads.outputs) == (
        "head", 9, 6, 3,
    )  # fmt: skip
    assert registry.read("m", 1).heads is None
    store = registry.read("m", 2).heads
    assert np.array_equal(store.gather(slots_of(store, names(9))), heads.weights)
    file = Path(registry.root) / "models" / "m" / "2" / "heads.bin"
    assert (
        file.stat().st_size == dressed.heads.nbytes == 64 + 9 * stride(dressed.heads) + 9 * 28 + 32
    )


def test_tables_show_heads(registry):
    publish(registry)
    assert "num_heads" not in registry.versions("m")
    publish(registry, heads=HeadSet("head", names(9), numbers(9)))
    assert registry.versions("m")["num_heads"].fillna(0).tolist() == [0, 9]


def test_a_manifest_from_before_heads_is_still_read(registry):
    manifest = publish(registry)
    fields = msgspec.json.decode(encode(manifest))
    assert fields.pop("heads") is None
    assert decode(msgspec.json.encode(fields), "old") == manifest


@pytest.mark.parametrize("layout", ["head", "additive", "adapter"])
def test_heads_for_another_body_are_stale(registry, layout):
    inputs = 3 if layout == "adapter" else 6
    model = models.build("mlp", {"sizes": SIZES})
    fits = trained_on_state(layout, model.state_dict())
    heads = HeadSet(layout, names(2), numbers(2, inputs), [fits, ELSEWHERE])
    manifest = registry.publish("m", model, **MODEL, heads=heads)
    assert trained_on(layout, manifest.digests) == fits
    assert [registry.read("m", 1).heads.find(name) >= 0 for name in names(2)] == [True, False]
    with torch.no_grad():
        model.head.bias += 1
    registry.publish("m", model, **MODEL, heads=heads)
    assert (registry.read("m", 2).heads.find("client-0") >= 0) == (layout == "head"), (
        "a head stands on the body alone"
    )


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (HeadSet("head", names(2), numbers(2, 5)), r"takes \(7, 3\)"),
        (HeadSet("additive", names(2), numbers(2, 6, 4)), r"takes \(7, 3\)"),
        (HeadSet("adapter", names(2), numbers(2, 4, 4)), r"takes \(4, 3\)"),
        (
            HeadSet("head", names(2), np.where(np.arange(2)[:, None, None], np.nan, numbers(2))),
            "'client-1' holds NaN",
        ),
        (
            HeadSet("head", names(2), np.where(np.arange(2)[:, None, None], numbers(2), -np.inf)),
            "'client-0' holds NaN",
        ),
    ],
    ids=["inputs", "outputs", "adapter", "nan", "infinite"],
)
def test_heads_that_do_not_fit_are_not_published(registry, heads, message):
    with pytest.raises(InvalidModelError, match=message):
        publish(registry, heads=heads)
    assert registry.version_numbers("m") == [] and not os.listdir(f"{registry.root}/staging")
    assert publish(registry).version == 1


@pytest.mark.parametrize(
    "heads", [{}, {"a": {"head.weight": torch.ones(3, 6)}}, 3], ids=["empty", "states", "number"]
)
def test_what_is_no_set_of_heads_is_refused(registry, heads):
    with pytest.raises(InvalidModelError, match="give a HeadSet"):
        publish(registry, heads=heads)


def test_a_model_without_a_body_takes_no_heads(registry, monkeypatch):
    monkeypatch.setattr(models.architectures, "_known", models.architectures._known.copy())
    models.register("flat_for_heads", input_shape=(4,), output_shape=(3,))(
        lambda: torch.nn.Linear(4, 3)
    )
    with pytest.raises(InvalidModelError, match="Linear is not a models"):
        registry.publish(
            "m",
            torch.nn.Linear(4, 3),
            architecture="flat_for_heads",
            heads=HeadSet("head", names(2), numbers(2, 4)),
        )


class Squashed(models.SplitModel):
    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize(
    "make",
    [lambda: Squashed(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)),
     lambda: models.SplitModel(torch.nn.Linear(4, 6), torch.nn.Sequential(torch.nn.Linear(6, 3)))],
    ids=["forward of its own", "head of two parts"],
)  # fmt: skip
def test_a_model_that_computes_more_than_head_of_body_takes_no_heads(registry, monkeypatch, make):
    """The personal lane runs body and head: what a forward does between them would be left out
    without a word."""
    monkeypatch.setattr(models.architectures, "_known", models.architectures._known.copy())
    models.register("more_for_heads", input_shape=(4,), output_shape=(3,))(make)
    with pytest.raises(InvalidModelError, match="as it stands"):
        registry.publish(
            "m", make(), architecture="more_for_heads", heads=HeadSet("head", names(2), numbers(2))
        )


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_disk_publishes_nothing(registry, monkeypatch, after):
    publish(registry)
    write, written = os.write, []

    def full(fd, data):
        if b"heads.bin" in os.readlink(f"/proc/self/fd/{fd}".encode()):
            if len(written) == after:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(len(data))
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(FlservingError, match="No space left"):
        publish(registry, heads=HeadSet("head", names(9), numbers(9)))
    monkeypatch.undo()
    assert registry.version_numbers("m") == [1] and not os.listdir(f"{registry.root}/staging")
    assert publish(registry, heads=HeadSet("head", names(9), numbers(9))).version == 2


def test_a_version_whose_heads_are_gone_is_corrupt(registry):
    publish(registry, heads=HeadSet("head", names(9), numbers(9)))
    os.unlink(f"{registry.root}/models/m/1/heads.bin")
    with pytest.raises(CorruptArtifactError, match=r"m/1/heads\.bin"):
        registry.read("m", 1)
    # compare reads both versions whole
    with pytest.raises(CorruptArtifactError, match=r"m/1/heads\.bin"):
        registry.compare("m", 1, 1)
