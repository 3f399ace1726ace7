"""Bookkeeping never stops serving: answers, health and promotions go on while a file that they do
not need is locked, damaged, gone or cannot be written; the books go on by themselves once it is
well again."""

import gc
import os
import shutil
import sqlite3
import threading
import weakref
from contextlib import ExitStack, contextmanager

import httpx
import pytest

import flserving
from experiment_models import LOUD, ROW, named, publish, published, server_of
from flserving import Registry
from flserving.api.auth import Role, Tokens
from flserving.api.client import Client
from flserving.errors import (
    ConflictError,
    CorruptArtifactError,
    FlservingError,
    ModelExecutionError,
    OverloadedError,
    ServerClosedError,
)
from flserving.experiments import controller, feedback
from flserving.experiments.bookkeeping import Clerk
from flserving.experiments.feedback import FILE_NAME, FeedbackStore
from flserving.registry.experiment import Experiment
from flserving.registry.forget import KEY_FILE
from serving_models import PATIENCE_S, wait_until

pytestmark = pytest.mark.timeout(120)
LOG = {"who": "test", "why": "to see"}
AB = Experiment.of("ab", {"a": (1, 0.5), "b": (2, 0.5)})
CANARY = Experiment.canary("round-2", 1, 2, share=0.5)
BANDIT = Experiment.of("ab", {"a": (1, 0.5), "b": (2, 0.5)}, rule="bandit")


@pytest.fixture
def registry(tmp_path):
    with published(tmp_path) as registry:
        yield registry


@pytest.fixture
def server(registry):
    with server_of(registry) as server:
        yield server


# What happens to files


@contextmanager
def locked(path):
    """Somebody keeps the database: for readers, too, unless they were here before. It outlives
    every wait of a test."""
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        try:
            other.executescript(
                "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; CREATE TABLE held (x)"
            )
        except sqlite3.OperationalError:
            other.executescript("PRAGMA locking_mode = NORMAL; BEGIN IMMEDIATE;")
        yield
    finally:
        other.close()


@contextmanager
def damaged(path):
    for name in (f"{path}-wal", f"{path}-shm"):
        if os.path.exists(name):
            os.unlink(name)
    with open(path, "wb") as file:
        file.write(b"no database " * 2_000)
    yield
    os.unlink(path)


@contextmanager
def a_directory(path):
    for name in (path, f"{path}-wal", f"{path}-shm"):
        if os.path.exists(name):
            os.unlink(name)
    os.mkdir(path)
    yield
    os.rmdir(path)


@contextmanager
def full(path):
    """SQLite's own error of a full disk, at every change of this database."""

    class Full(sqlite3.Connection):
        def execute(self, sql, *values):
            if sql.startswith(("BEGIN", "PRAGMA journal_mode")):
                small = sqlite3.connect(":memory:")
                small.execute("PRAGMA max_page_count = 1")
                try:
                    small.execute("CREATE TABLE t (x)")
                finally:
                    small.close()
            return super().execute(sql, *values)

    def connect(database, *values, **options):
        if os.fspath(database) == os.fspath(path):
            options["factory"] = Full
        return sqlite3_connect(database, *values, **options)

    sqlite3_connect = sqlite3.connect
    if os.path.exists(path):
        os.unlink(path)  # so that it is opened anew
    feedback.sqlite3.connect = connect
    try:
        yield
    finally:
        feedback.sqlite3.connect = sqlite3_connect


HARMS = (locked, damaged, a_directory, full)


def tokens_of(*names):
    tokens = Tokens()
    for name in names:
        tokens.add(name, Role.INFER, name)
    return tokens


@pytest.mark.parametrize("begun", [False, True], ids=["before", "meanwhile"])
@pytest.mark.parametrize("experiment", [AB, CANARY, BANDIT], ids=["ab", "canary", "bandit"])
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_answers_health_and_promotions_wait_for_no_feedback_store(
    tmp_path, registry, server, monkeypatch, harm, experiment, begun
):
    monkeypatch.setattr(controller, "JUDGE_S", 0)
    monkeypatch.setattr(feedback, "BUSY_S", 0.2)
    path, names = str(tmp_path / FILE_NAME), [f"c-{i}" for i in range(4)]
    publish(registry, 1, name="other", alias="default")
    publish(registry, 2, name="other")
    server.serve(registry, "other")
    if begun:
        registry.start_experiment("m", experiment, **LOG)
        server.predict(ROW, client="c-0")
        wait_until(lambda: os.path.exists(path), "the store")
        server.experiments.report("m")
    with ExitStack() as stack:
        endpoint = stack.enter_context(flserving.serve(server, tokens=tokens_of(*names)))
        clients = [stack.enter_context(Client(endpoint.url, name)) for name in names]
        with harm(path):
            if not begun:
                registry.start_experiment("m", experiment, **LOG)

            def told():
                for client in clients:
                    assert client.predict(ROW, model="m")["arm"] in experiment.arms
                assert httpx.get(f"{endpoint.url}/v2/health/live").status_code == 200
                return "m/default verdict" in server.health_check()["problems"]

            wait_until(told, "the problem in health")
            assert "receipt" not in clients[0].predict(ROW, model="m")
            registry.set_alias("other", "default", 2, **LOG)
            wait_until(
                lambda: clients[0].predict(ROW, model="other")["model_version"] == "2",
                "a promotion",
            )

        def well():
            answer = clients[0].predict(ROW, model="m")
            return "receipt" in answer and not server.health_check()["problems"]

        wait_until(well, "the books go on")
        clients[0].feedback(clients[0].predict(ROW, model="m")["receipt"], 1, model="m")
        assert sum(arm["rewards"] for arm in server.experiments.report("m")["arms"].values()) == 1


OPTIONAL = (FILE_NAME, KEY_FILE, "release.key", "deltas")


@pytest.mark.parametrize("begun", [False, True], ids=["before", "meanwhile"])
@pytest.mark.parametrize("what", ["garbage", "directory", "removed"])
@pytest.mark.parametrize("name", OPTIONAL)
def test_no_optional_file_of_a_registry_is_needed_for_an_answer(
    tmp_path, registry, name, what, begun
):
    path = tmp_path / name

    def harm():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if what == "directory":
            path.mkdir()
        elif what == "garbage":
            path.touch(0o600)
            path.write_bytes(b"garbage " * 1_000)

    if not begun:
        harm()
    with server_of(registry) as server:
        registry.start_experiment("m", AB, **LOG)
        for turn in range(20):
            if begun and turn == 10:
                server.experiments.report("m")  # whatever is made at first use is there
                harm()
            assert server.predict(ROW, client="c")["arm"] in AB.arms
        registry.conclude_experiment("m", version=2, **LOG)
        assert server.predict(ROW, client="c")["model_version"] == "2", "promotions go on, too"


def test_an_answer_is_given_while_the_store_is_being_opened(registry, server, monkeypatch):
    """However long that takes: nothing of it happens in the thread that answers."""
    opening, open_it = threading.Event(), threading.Event()

    def connect(store):
        opening.set()
        assert open_it.wait(PATIENCE_S)
        return connect_it(store)

    connect_it = FeedbackStore._connect
    monkeypatch.setattr(FeedbackStore, "_connect", connect)
    registry.start_experiment("m", AB, **LOG)
    try:
        receipts = [server.predict(ROW, client="c")["receipt"] for _ in range(3)]
        assert opening.wait(PATIENCE_S)
        receipts.append(server.predict(ROW, client="c")["receipt"])
        monkeypatch.setattr(controller, "FEEDBACK_S", 0.01)
        with pytest.raises(OverloadedError, match="not counted within"):
            server.experiments.feedback("m", receipts[0], 1, "c")
        monkeypatch.setattr(controller, "FEEDBACK_S", PATIENCE_S)
    finally:
        open_it.set()
    for receipt in receipts[1:]:
        server.experiments.feedback("m", receipt, 1, "c")


@pytest.mark.parametrize("content", [b"", b"no key", b"ff" * 31], ids=["empty", "text", "short"])
def test_a_key_that_cannot_be_read_costs_the_receipts_only(
    tmp_path, registry, server, monkeypatch, content
):
    monkeypatch.setattr(controller, "JUDGE_S", 0)
    (tmp_path / KEY_FILE).touch(0o600)
    (tmp_path / KEY_FILE).write_bytes(content)
    registry.start_experiment("m", AB, **LOG)
    assert server.predict(ROW, client="c").keys() >= {"arm"}
    assert "receipt" not in server.predict(ROW, client="c")
    wait_until(lambda: KEY_FILE in str(server.health_check()["problems"]), "the problem in health")
    with pytest.raises(CorruptArtifactError, match="is not a key"):
        server.experiments.feedback("m", "x", 1, "c")
    (tmp_path / KEY_FILE).unlink()
    wait_until(lambda: "receipt" in server.predict(ROW, client="c"), "a new key")


def test_a_store_that_was_removed_is_made_again(tmp_path, registry, server):
    registry.start_experiment("m", AB, **LOG)
    first, second = (server.predict(ROW, client="c")["receipt"] for _ in range(2))
    server.experiments.feedback("m", first, 1, "c")
    for name in (FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm"):
        os.unlink(tmp_path / name)
    server.experiments.feedback("m", second, 1, "c")  # its key is another file
    other = FeedbackStore(str(tmp_path))
    run = registry.experiments("m")["default"].run
    assert sum(n for n, _ in other.sums(run).values()) == 1, (
        "it is in the new file, where all processes see it"
    )
    other.close()


def test_what_waits_to_be_counted_is_bounded_and_what_is_dropped_is_told(
    registry, server, monkeypatch
):
    monkeypatch.setattr(controller, "JUDGE_S", 3600)
    monkeypatch.setattr(controller, "MOST_SEEN", 3)
    publish(registry, 4, fragile=True)
    running = registry.start_experiment(
        "m", Experiment.of("x", {"a": (1, 0.5), "b": (4, 0.5)}), **LOG
    )
    clients = named(running, "b", 6)
    for client in clients:
        for _ in range(2):
            with pytest.raises(ModelExecutionError):
                server.predict(LOUD, client=client)
    report = server.experiments.report("m")
    assert (report["arms"]["b"]["failed"], report["dropped"]) == (6, 6)


# The clerk


def test_a_clerk_refuses_what_is_too_much_and_piles_up_no_routine():
    clerk, go, done = Clerk(capacity=3), threading.Event(), []
    try:
        assert clerk.do(lambda: 7).result(PATIENCE_S) == 7
        held = clerk.do(go.wait)
        for turn in range(5):
            clerk.routine(lambda turn=turn: done.append(turn))
        last = clerk.do(done.append, "last")
        with pytest.raises(OverloadedError, match="behind"):
            clerk.do(done.append, "too much")
        go.set()
        assert held.result(PATIENCE_S) and last.result(PATIENCE_S) is None
        assert done == [0, "last"]
        with pytest.raises(ZeroDivisionError):
            clerk.do(lambda: 1 / 0).result(PATIENCE_S)
        for _ in range(9):
            clerk.do(int).result(PATIENCE_S)
    finally:
        go.set()
        clerk.close()
    clerk.routine(lambda: done.append("late"))
    with pytest.raises(ServerClosedError):
        clerk.do(int)
    assert "late" not in done


def test_a_clerk_without_a_thread_keeps_nothing_of_what_it_refuses(monkeypatch):
    clerk, done = Clerk(capacity=2), []
    alive = []

    class Job:
        def __init__(self):
            alive.append(weakref.ref(self))

        def __call__(self):
            done.append(self)

    def no_thread(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        for _ in range(10):
            with pytest.raises(OverloadedError, match="no thread can start"):
                clerk.do(Job())
    gc.collect()
    assert not any(job() for job in alive), "a refused job is still in a queue"
    assert clerk.do(lambda: 7).result(PATIENCE_S) == 7
    clerk.close()
    assert not done, "what was refused is not done later"
    with pytest.raises(ServerClosedError):
        clerk.do(int)


# Rows that cannot be read


NEWER = (
    '{"id":"ab","arms":{"a":{"version":1,"weight":0.5},"b":{"version":2,"weight":0.5}},'
    '"run":"1f","key":"ab","ramp":3}'
)
ROWS = {
    "newer": NEWER,
    "no-json": "no json",
    "cut": NEWER[:40],
    "no-text": b"\xff\xfe",
    "no-weight": NEWER.replace(',"ramp":3', "").replace("0.5}}", "0.0}}"),
    "no-key": NEWER.replace(',"ramp":3', "").replace('"key":"ab"', '"key":"xy"'),
    "long-key": NEWER.replace(',"ramp":3', "").replace('"key":"ab"', f'"key":"{"ab" * 65}"'),
    "number": "7",
}


def add_row(root, content):
    with sqlite3.connect(root / "registry.sqlite3") as index:
        index.execute(
            "INSERT INTO experiments (name, alias, content, who, why, at) "
            "VALUES ('m', 'default', CAST(? AS TEXT), 'a newer one', 'it can', '2026-01-01T00:00:00+00:00')",
            (content,),
        )
    index.close()


@pytest.mark.parametrize("running", [False, True], ids=["before", "meanwhile"])
@pytest.mark.parametrize("content", ROWS.values(), ids=ROWS)
def test_an_experiment_that_cannot_be_read_costs_itself_only_and_can_be_ended(
    tmp_path, content, running
):
    with published(tmp_path) as registry:
        registry.set_alias("m", "beside", 3, **LOG)
        registry.start_experiment("m", Experiment.of("good", {"a": (2, 1.0)}), "beside", **LOG)
    if not running:
        add_row(tmp_path, content)
    with Registry(tmp_path) as registry, server_of(registry) as server:
        assert server.predict(ROW)["model_version"] == "1"
        if running:
            add_row(tmp_path, content)
            wait_until(lambda: server.health_check()["problems"], "the problem in health")
        assert "cannot be read here" in server.health_check()["problems"]["m/default experiment"]
        for client in ("c-0", "c-1", "c-2"):
            answer = server.predict(ROW, client=client)
            assert (answer["model_version"], answer.get("arm")) == ("1", None), (
                "the alias's own version"
            )
            assert server.predict(ROW, version="beside", client=client)["arm"] == "a"
        assert registry.experiments("m").keys() == {"beside"} and registry.unread_experiments(
            "m"
        ).keys() == {"default"}
        assert "cannot be read here" in registry.experiment_log("m")[-1]["experiment"]
        for refused in (
            lambda: registry.set_alias("m", "default", 2, **LOG),
            lambda: registry.start_experiment("m", AB, **LOG),
            lambda: registry.conclude_experiment("m", run="1f", **LOG),
        ):
            with pytest.raises(ConflictError):
                refused()
        assert registry.conclude_experiment("m", version=2, **LOG) is None
        assert server.predict(ROW, client="c-0")["model_version"] == "2"
        server.refresh()
        assert server.health_check()["problems"] == {}
        registry.start_experiment("m", Experiment.of("ab", {"a": (2, 0.5), "b": (1, 0.5)}), **LOG)
        assert server.predict(ROW, client="c-0")["arm"] in "ab"


# Names in the store


OLD_STORE = """
CREATE TABLE secret (id INTEGER PRIMARY KEY CHECK (id = 1), key BLOB NOT NULL);
CREATE TABLE used (request BLOB PRIMARY KEY, until_s REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX used_until ON used (until_s);
CREATE TABLE rewards (
    run TEXT, arm TEXT, client BLOB, n INTEGER NOT NULL, total REAL NOT NULL, PRIMARY KEY (run, arm, client)
) WITHOUT ROWID;
CREATE TABLE outcomes (run TEXT, arm TEXT, requests INTEGER NOT NULL, PRIMARY KEY (run, arm)) WITHOUT ROWID;
CREATE TABLE failures (
    run TEXT, arm TEXT, client BLOB, n INTEGER NOT NULL, PRIMARY KEY (run, arm, client)
) WITHOUT ROWID;
"""
NAMES = ["alice-of-ward-7", "bob-of-ward-7", "zoë-of-ward-7", "\udc80-of-ward-7"]


def bytes_of(folder):
    files = sorted(folder.glob("feedback*"))
    assert files
    return b"".join(file.read_bytes() for file in files)


def test_a_store_with_names_in_it_forgets_them_and_keeps_what_they_said(tmp_path):
    old = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    old.executescript(f"PRAGMA journal_mode = WAL; {OLD_STORE}")
    old.execute("INSERT INTO secret VALUES (1, ?)", (b"s" * 32,))
    # stores older still hold text
    old.execute("INSERT INTO rewards VALUES ('run', 'a', 'a-text-of-ward-7', 1, 0.5)")
    for place, name in enumerate(NAMES):
        said = name.encode(errors="surrogatepass")
        old.execute("INSERT INTO rewards VALUES ('run', 'a', ?, ?, 1.0)", (said, place + 1))
        old.execute("INSERT INTO failures VALUES ('run', 'a', ?, ?)", (said, place + 1))
    old.execute("INSERT INTO outcomes VALUES ('run', 'a', 20)")
    old.close()
    assert b"of-ward-7" in bytes_of(tmp_path)
    for _ in range(2):  # opened again, nothing is done twice
        store = FeedbackStore(str(tmp_path))
        found = store.rewards("run")["a"]
        assert found == {
            store.pseudonym(name).hex(): (place + 1, 1.0) for place, name in enumerate(NAMES)
        } | {store.pseudonym("a-text-of-ward-7").hex(): (1, 0.5)}
        assert store.outcomes("run") == {"a": (20, 10, 4)}
        store.close()
        assert b"of-ward-7" not in bytes_of(tmp_path) and b"s" * 32 not in bytes_of(tmp_path)


def test_no_file_of_feedback_tells_a_client_and_only_the_key_tells_whose_a_row_is(tmp_path):
    store = FeedbackStore(str(tmp_path))
    for name in NAMES:
        store.add(store.read(store.receipt("run", "a", name), name), 1)
        store.count("run", {("a", None): 1, ("a", name): 1})
    rows = set(store.rewards("run")["a"])
    assert rows == {store.pseudonym(name).hex() for name in NAMES}
    assert b"of-ward-7" not in bytes_of(tmp_path)
    store.close()
    assert b"of-ward-7" not in bytes_of(tmp_path)
    shutil.move(tmp_path / KEY_FILE, tmp_path / "elsewhere")
    other = FeedbackStore(str(tmp_path))
    assert not rows & {other.pseudonym(name).hex() for name in NAMES}, (
        "trying names finds nobody without the key"
    )
    other.close()


def test_errors_of_the_store_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "BUSY_S", 0.1)
    path = str(tmp_path / FILE_NAME)
    for harm, kind, says in [
        (locked, OverloadedError, "busy .*try again"),
        (damaged, CorruptArtifactError, "damaged .*remove it"),
        (a_directory, FlservingError, "cannot be used .*permissions"),
        (full, FlservingError, "disk is full.*free space"),
    ]:
        store = FeedbackStore(str(tmp_path))
        with harm(path):
            with pytest.raises(kind, match=says):
                store.sums("run") if harm is not full else store.count("run", {("a", None): 1})
            assert store.problem
        store.count("run", {("a", None): 1})
        assert store.sums("run") == {} and store.problem is None
        store.close()
    with pytest.raises(ServerClosedError):
        store.sums("run")
