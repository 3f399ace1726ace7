"""What passes the gate, what does not and why, and that nothing moves unless it passed."""

import shutil
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from scipy.stats import binomtest

from flserving import Registry, models
from flserving.errors import (
    ConfigError,
    ConflictError,
    CorruptArtifactError,
    InvalidInputError,
    NotFoundError,
    NotSupportedError,
)
from flserving.federated import gate as judging
from flserving.federated import train
from flserving.federated.data import digits, make_clients
from flserving.federated.gate import CHECKS, Gate, gated, golden_rows
from flserving.federated.rounds import publish_rounds
from flserving.registry.experiment import Experiment
from flserving.registry.manifest import Lineage


@pytest.fixture(scope="module")
def clients():
    return make_clients(*digits(), num_clients=10, alpha=1.0, seed=3)


@pytest.fixture(scope="module")
def run(clients):
    return train(clients=clients, rounds=6, seed=3, progress=False)


@pytest.fixture(scope="module")
def gate(clients):
    return Gate(clients=clients)


@pytest.fixture
def registry(tmp_path, run, gate):
    """Five rounds that went through the gate."""
    with Registry(tmp_path) as registry:
        judge = gated(registry, "m", gate)
        assert all(judge(result).passed for result in run.rounds[:5])
        yield registry


def published(registry, result, change=lambda tensor: tensor, **replaced):
    state = {name: change(tensor.clone()) for name, tensor in result.state.items()}
    return publish_rounds(registry, "m")(replace(result, state=state, **replaced)).version


def test_a_clean_round_passes_and_the_log_says_why(registry, run, gate):
    version = published(registry, run.rounds[5])
    assert registry.resolve("m") == 5
    verdict = gate.promote(registry, "m", version)
    assert verdict.passed and verdict.failed == () and verdict.against == 5
    assert tuple(check.name for check in verdict.checks) == CHECKS
    assert registry.resolve("m") == version
    last = registry.history("m").iloc[-1]
    assert last["who"] == "gate" and last["why"] == str(verdict) and "accuracy: 0." in last["why"]
    frame = verdict.to_frame()
    assert list(frame.index) == list(CHECKS) and list(frame.columns) == [
        "passed",
        "value",
        "limit",
        "words",
    ]
    assert tuple(frame.loc["golden", ["value", "limit"]]) == (0, 0), (
        "no golden rows: none answered wrong"
    )
    assert frame["passed"].all() and frame.loc["norm", "value"] <= frame.loc["norm", "limit"]
    with pytest.raises(FrozenInstanceError):
        verdict.version = 9


def test_the_first_version_has_nothing_to_be_compared_with(tmp_path, run, gate):
    with Registry(tmp_path) as registry:
        verdict = gate.promote(registry, "m", published(registry, run.rounds[0]))
        assert verdict.passed and verdict.against is None and registry.resolve("m") == 1
        assert "no version to compare with" in verdict.to_frame().loc["accuracy", "words"]


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda t: t * 1e30, "finite"),  # the weights are finite, their answers are not
        (lambda t: t + 5.0, "norm"),
        (lambda t: -t, "accuracy"),
        (lambda t: t.flip(0), "worst client"),
        (lambda t: t.flip(0), "agreement"),
    ],
    ids=["answers", "norm", "accuracy", "worst", "agreement"],
)
def test_bad_weights_are_refused_and_nothing_moves(registry, run, gate, change, failed):
    version, moves = published(registry, run.rounds[5], change), len(registry.history("m"))
    verdict = gate.promote(registry, "m", version)
    assert not verdict.passed and failed in verdict.failed
    assert registry.resolve("m") == 5 and len(registry.history("m")) == moves
    assert tuple(check.name for check in verdict.checks) == CHECKS
    if failed == "finite":
        words = verdict.to_frame()["words"]
        assert words["accuracy"] == f"not judged: {words['finite']}"


def test_weights_that_are_not_finite_are_named_and_not_judged(registry, run, gate, monkeypatch):
    """The registry takes no such version: one that comes from elsewhere must not pass here."""
    version = published(registry, run.rounds[5])
    monkeypatch.setattr(judging, "first_non_finite", lambda arrays: "head.bias")
    verdict = gate.check(registry, "m", version)
    words = verdict.to_frame()["words"]
    assert not verdict.passed and words["finite"] == "head.bias holds NaN or infinite values"
    assert words["norm"] == f"not judged: {words['finite']}"


@pytest.mark.parametrize(
    ("accepted", "told"), [(3, "no history yet"), (4, "last 3 accepted"), (13, "last 10 accepted")]
)
def test_an_update_is_compared_with_the_last_ten_or_where_they_are_not_three_with_the_weights(
    tmp_path, run, gate, accepted, told
):
    """A first version is no update."""
    with Registry(tmp_path) as registry:
        for number in range(accepted):
            registry.set_alias(
                "m", "default", published(registry, run.rounds[number % 2]), who="me", why="test"
            )
        verdict = gate.check(registry, "m", published(registry, run.rounds[5]))
        assert told in verdict.to_frame().loc["norm", "words"]


def test_a_round_with_too_few_clients_is_refused_for_that_alone(registry, run, gate):
    counts = dict(list(run.rounds[5].sample_counts.items())[:4])
    verdict = gate.promote(registry, "m", published(registry, run.rounds[5], sample_counts=counts))
    assert verdict.failed == ("clients",) and "4 clients" in str(verdict)


def test_a_version_without_lineage_needs_a_gate_that_does_not_ask_for_clients(
    registry, run, gate, clients
):
    result = run.rounds[5]
    version = registry.publish(
        "m", result.state, architecture="digits_mlp", preprocessing=result.preprocessing
    ).version
    assert gate.check(registry, "m", version).failed == ("clients",)
    assert Gate(clients=clients, min_clients=0).check(registry, "m", version).passed


def test_another_preprocessing_or_architecture_is_another_form(registry, run, gate):
    other = {
        name: [value + 0.5 for value in values]
        for name, values in run.rounds[5].preprocessing.items()
    }
    verdict = gate.check(registry, "m", published(registry, run.rounds[5], preprocessing=other))
    assert "form" in verdict.failed and "preprocessing" in verdict.to_frame().loc["form", "words"]
    lineage, statistics = Lineage(num_clients=10), run.rounds[5].preprocessing
    sizes = {"sizes": [64, 16, 10]}
    module = models.build("mlp", sizes)
    version = registry.publish(
        "m", module, architecture="mlp", parameters=sizes, lineage=lineage, preprocessing=statistics
    ).version
    verdict = gate.check(registry, "m", version)
    assert "architecture" in verdict.to_frame().loc["form", "words"] and not verdict.passed


def test_golden_rows_keep_their_answers(registry, run, clients):
    rows, answers = golden_rows(registry, "m", clients)
    assert len(rows) == len(answers) == 20 and set(answers) == set(range(10))
    version = published(registry, run.rounds[5])
    assert Gate(clients=clients, golden=(rows, answers)).check(registry, "m", version).passed
    answers[0] = (answers[0] + 1) % 10
    verdict = Gate(clients=clients, golden=(rows, answers)).check(registry, "m", version)
    assert verdict.failed == ("golden",) and "1 of 20" in str(verdict)


def test_golden_rows_are_right_answers_only(registry, clients):
    """Of a class that the version never names there are none, and of others no wrong one in their
    place."""
    others = [
        replace(client, test_y=np.where(client.test_y == 3, 4, client.test_y)) for client in clients
    ]
    others[0] = replace(others[0], test_y=np.full_like(others[0].test_y, 11))
    rows, answers = golden_rows(registry, "m", others)
    assert sorted(set(answers.tolist())) == [0, 1, 2, 4, 5, 6, 7, 8, 9] and len(rows) == 18


def test_the_bound_on_the_drop_is_that_of_the_paper(clients):
    """Agresti and Min's own formula, written out; and its level, by simulation."""
    before, now = np.ones(100, bool), np.ones(100, bool)
    now[:12], before[12:20] = False, False
    check = Gate(clients=clients)._accuracy(before, now)
    expected = (12 - 8) / 102 + 1.6448536 * np.sqrt((12 + 8 + 1) - (12 - 8) ** 2 / 102) / 102
    assert check.value == pytest.approx(expected) and not check.passed
    rng, gate, drop = np.random.default_rng(0), Gate(clients=clients, tolerance=0.05), 0.05
    passed = 0
    for _ in range(2000):  # a drop of exactly the tolerance may pass in 5 of 100
        kind = rng.choice(3, 500, p=[drop + 0.04, 0.04, 1 - drop - 0.08])
        passed += gate._accuracy(kind != 1, kind != 0).passed
    assert passed / 2000 == pytest.approx(0.05, abs=0.02)


def test_one_clients_drop_counts_when_mcnemars_test_says_so(clients):
    before = [np.ones(len(c.test_y), bool) for c in clients]
    for lost in range(len(before[2]) + 1):
        now = [part.copy() for part in before]
        now[2][:lost] = False
        check = Gate(clients=clients, client_tolerance=0.0)._worst(before, now)
        sure = lost > 0 and bool(
            binomtest(lost, lost, 0.5, alternative="greater").pvalue * len(clients) <= 0.05
        )
        assert check.passed is not sure
        assert check.value == pytest.approx(lost / len(before[2]) if sure else 0)
        assert (clients[2].id in check.words) is sure


def test_a_callback_publishes_every_round_and_promotes_the_good_ones(tmp_path, clients, gate):
    verdicts = []

    def broken(client, number, update):
        return {name: tensor * (50 if number == 3 else 1) for name, tensor in update.items()}

    with Registry(tmp_path) as registry:
        judge = gated(registry, "m", gate, on_verdict=verdicts.append)
        train(clients=clients, rounds=3, seed=3, corrupt=broken, on_round=judge, progress=False)
        assert registry.version_numbers("m") == [1, 2, 3]
        assert [verdict.passed for verdict in verdicts] == [True, True, False]
        assert registry.resolve("m") == 2


def test_personal_heads_are_judged_as_they_are_served(tmp_path):
    own = make_clients(*digits(), num_clients=6, alpha=1.0, permute_labels=True, seed=1)
    verdicts = []
    with Registry(tmp_path) as registry:
        judge = gated(registry, "m", Gate(clients=own), on_verdict=verdicts.append)
        run = train("fedper", clients=own, rounds=4, progress=False, on_round=judge)
        assert all(verdict.passed for verdict in verdicts)
        served = sum(run.final.client_accuracy[c.id] * len(c.test_y) for c in own) / sum(
            len(c.test_y) for c in own
        )
        assert f"{served:.3f} after" in verdicts[-1].to_frame().loc["accuracy", "words"]
        assert served > run.final.metrics["global_accuracy"] + 0.2


def test_an_alias_that_moved_meanwhile_stays(registry, run, gate, monkeypatch):
    version = published(registry, run.rounds[5])
    check = Gate.check

    def slow(self, *args):
        verdict = check(self, *args)
        registry.set_alias("m", "default", 3, who="somebody", why="faster")
        return verdict

    monkeypatch.setattr(Gate, "check", slow)
    with pytest.raises(ConflictError, match="points at 3, not at 5"):
        gate.promote(registry, "m", version)
    assert registry.resolve("m") == 3


def test_an_alias_in_an_experiment_stays_and_the_training_goes_on(registry, run, gate):
    registry.start_experiment(
        "m", Experiment.of("ab", {"old": (5, 0.5), "new": (4, 0.5)}), who="me", why="test"
    )
    before = moves(registry)
    verdict = gated(registry, "m", gate)(run.rounds[5])
    assert verdict.failed == ("alias",) and "experiment" in str(verdict)
    with pytest.raises(ConflictError):
        gate.promote(registry, "m", 6)
    assert moves(registry) == before and list(before[2])


def moves(registry):
    """What a refusal must leave as it was."""
    return registry.aliases("m"), len(registry.history("m")), registry.experiments("m")


def test_an_alias_that_moves_while_a_round_is_judged_is_a_refusal_and_the_training_goes_on(
    registry, run, gate, monkeypatch
):
    check, before = Gate.check, []

    def slow(self, *args):
        verdict = check(self, *args)
        if not before:
            registry.set_alias("m", "default", 3, who="somebody", why="faster")
            before.append(moves(registry))
        return verdict

    monkeypatch.setattr(Gate, "check", slow)
    verdict = gated(registry, "m", gate)(run.rounds[5])
    assert (
        "alias" in verdict.failed
        and "points at 3, not at 5" in str(verdict)
        and verdict.against == 3
    )
    assert moves(registry) == before[0] and registry.version_numbers("m")[-1] == 6
    monkeypatch.undo()
    assert gated(registry, "m", gate)(run.rounds[5]).against == 3, (
        "the next round is compared with what serves now"
    )


@pytest.mark.parametrize("gone", [5, 6], ids=["what serves now", "what is judged"])
def test_a_version_whose_files_are_gone_ends_the_training_and_moves_nothing(
    registry, run, gate, monkeypatch, gone
):
    publish, before = Registry.publish, moves(registry)

    def vanishing(self, *args, **options):
        manifest = publish(self, *args, **options)
        shutil.rmtree(f"{self.root}/models/m/{gone}")
        return manifest

    monkeypatch.setattr(Registry, "publish", vanishing)
    with pytest.raises(CorruptArtifactError, match=f"{gone}"):
        gated(registry, "m", gate)(run.rounds[5])
    with pytest.raises(CorruptArtifactError, match=f"{gone}"):
        gate.promote(registry, "m", 6)
    assert moves(registry) == before


def test_clients_of_another_width_end_the_training_and_move_nothing(registry, run, clients):
    narrow = [
        replace(client, train_x=client.train_x[:, :32], test_x=client.test_x[:, :32])
        for client in clients
    ]
    before = moves(registry)
    with pytest.raises(InvalidInputError, match="32"):
        gated(registry, "m", Gate(clients=narrow))(run.rounds[5])
    assert moves(registry) == before and registry.version_numbers("m")[-1] == 6


def test_what_was_rolled_back_is_no_measure_of_the_next(registry, run, gate):
    registry.set_alias(
        "m",
        "default",
        published(registry, run.rounds[5], lambda t: t + 5.0),
        who="me",
        why="careless",
    )
    registry.rollback("m", who="me", why="careless")
    verdict = gate.check(registry, "m", published(registry, run.rounds[5]))
    assert verdict.passed and "last 4 accepted" in verdict.to_frame().loc["norm", "words"]


def test_versions_that_are_not_there_and_regressions_are_errors(registry, gate):
    with pytest.raises(NotFoundError):
        gate.promote(registry, "m", 99)
    assert registry.resolve("m") == 5
    module = models.build("mlp", {"sizes": [4, 1]})
    registry.publish(
        "r", module, architecture="mlp", parameters={"sizes": [4, 1]}, output_type="regression"
    )
    with pytest.raises(NotSupportedError, match="regression"):
        gate.check(registry, "r", 1)


@pytest.mark.parametrize(
    "limits",
    [
        {"tolerance": -0.1},
        {"client_tolerance": 1.1},
        {"alpha": 0},
        {"agreement": 2},
        {"jump": "3"},
        {"min_clients": 1.5},
        {"clients": ()},
    ],
    ids=lambda limits: next(iter(limits)),
)
def test_limits_out_of_range_are_refused(clients, limits):
    with pytest.raises(ConfigError):
        Gate(**{"clients": clients, **limits})


def test_golden_rows_of_another_width_are_an_error(registry, run, clients):
    gate = Gate(clients=clients, golden=(np.zeros((2, 5), np.float32), np.zeros(2, np.int64)))
    with pytest.raises(InvalidInputError):
        gate.promote(registry, "m", published(registry, run.rounds[5]))
    assert registry.resolve("m") == 5


def test_golden_rows_and_answers_must_be_as_many(clients):
    with pytest.raises(ConfigError, match="golden"):
        Gate(clients=clients, golden=(np.zeros((2, 64), np.float32), np.zeros(1, np.int64)))
