"""Clients and their data: the partition loses nothing, permutations are fair, sums give the pooled
statistics."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

from budget import examples
from flserving.errors import ConfigError, InvalidInputError
from flserving.federated import data as datasets
from flserving.federated.data import (
    MIN_SAMPLES,
    Client,
    digits,
    dirichlet_partition,
    federated_statistics,
    make_clients,
)

X, Y = digits()


def labels_of(num_samples, num_classes=10):
    return np.arange(num_samples, dtype=np.int64) % num_classes


def test_digits_are_the_real_ones_and_nobody_can_change_them():
    assert X.shape == (1797, 64) and X.dtype == np.float32 and X.min() == 0 and X.max() == 16
    assert np.bincount(Y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    with pytest.raises(ValueError, match="read-only"):
        X[0, 0] = 1
    real_x, real_y = load_digits(return_X_y=True)
    assert np.array_equal(X, real_x) and np.array_equal(Y, real_y)


@given(
    num_samples=st.integers(20, 400),
    share=st.floats(0, 1),
    alpha=st.floats(1e-3, 1e6),
    seed=st.integers(0, 2**32),
)
@examples(150)
def test_every_sample_goes_to_exactly_one_client_and_every_client_gets_enough(
    num_samples, share, alpha, seed
):
    num_clients = 1 + int(share * (num_samples // MIN_SAMPLES - 1))
    parts = dirichlet_partition(
        labels_of(num_samples), num_clients, alpha, np.random.default_rng(seed)
    )
    assert len(parts) == num_clients
    assert sorted(np.concatenate(parts)) == list(range(num_samples))
    assert min(map(len, parts)) >= MIN_SAMPLES


@given(
    num_clients=st.integers(1, 179),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
@examples(25)
def test_every_client_has_both_splits_and_no_sample_is_in_two(num_clients, alpha, seed):
    x = np.arange(len(Y), dtype=np.float32)[:, None]  # a feature that says which sample it is
    clients = make_clients(x, Y, num_clients=num_clients, alpha=alpha, seed=seed)
    assert len({client.id for client in clients}) == num_clients
    for client in clients:
        train, test = (np.bincount(y, minlength=10) for y in (client.train_y, client.test_y))
        if (train + test).max() > 1:
            assert np.array_equal(test, (0.3 * (train + test) + 0.5).astype(int)), (
                "30 % of each class"
            )
            assert (train[test > 0] > 0).all(), "nobody is tested on a class that it has never seen"
        else:
            assert test.sum() == 1
        assert train.sum() > 0
        for features, labels in ((client.train_x, client.train_y), (client.test_x, client.test_y)):
            assert np.array_equal(Y[features[:, 0].astype(int)], labels), (
                "labels follow their samples"
            )
    everything = np.concatenate(
        [part for client in clients for part in (client.train_x, client.test_x)]
    )
    assert sorted(everything[:, 0]) == list(range(len(Y)))


def test_a_client_that_holds_every_class_once_is_tested_on_one_sample():
    (client,) = make_clients(X[:10], Y[:10], num_clients=1)
    assert sorted([*client.train_y, *client.test_y]) == list(range(10)) and len(client.test_y) == 1


def test_the_held_out_samples_are_a_random_choice():
    first, other = (make_clients(X, Y, num_clients=1, seed=seed)[0] for seed in (0, 1))
    rows = [{row.tobytes() for row in client.test_x} for client in (first, other)]
    assert 0.15 < len(rows[0] & rows[1]) / len(rows[0]) < 0.45, (
        "two random choices of 30 % share about 30 %"
    )


def biggest_share(clients):
    counts = [
        np.bincount(np.concatenate([client.train_y, client.test_y]), minlength=10)
        for client in clients
    ]
    return np.mean([count.max() / count.sum() for count in counts])


def test_alpha_says_how_uneven_the_clients_are():
    """At alpha 0.1 the largest class has nearly two thirds of a client's samples; at 100 about one
    tenth."""
    shares = {
        alpha: np.mean(
            [biggest_share(make_clients(X, Y, alpha=alpha, seed=seed)) for seed in range(5)]
        )
        for alpha in (0.1, 1.0, 100.0)
    }
    assert 0.57 <= shares[0.1] <= 0.70
    assert 0.25 <= shares[1.0] <= 0.45
    assert 0.10 <= shares[100.0] <= 0.16


def test_a_seed_means_one_partition():
    first, again, other = (make_clients(X, Y, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a.train_x, b.train_x) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a.train_x, b.train_x) for a, b in zip(first, other, strict=True))


def test_permuted_labels_rename_classes_client_by_client_and_move_no_sample():
    plain, permuted = (
        make_clients(X, Y, alpha=100.0, permute_labels=p, seed=1) for p in (False, True)
    )
    names = []
    for a, b in zip(plain, permuted, strict=True):
        assert np.array_equal(a.train_x, b.train_x) and np.array_equal(a.test_x, b.test_x)
        pairs = set(
            zip(
                np.r_[a.train_y, a.test_y].tolist(),
                np.r_[b.train_y, b.test_y].tolist(),
                strict=True,
            )
        )
        assert len(pairs) == 10 == len({name for _, name in pairs}), (
            "one name per class, one class per name"
        )
        names.append(dict(pairs))
    for block in (names[:10], names[10:20]):
        for label in range(10):
            assert sorted(naming[label] for naming in block) == list(range(10)), (
                "no name of a class is in the majority"
            )
    assert names[:10] != names[10:20]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_clients": 0}, r"num_clients is 0: use an integer in \[1, 179\]"),
        ({"num_clients": 180}, "num_clients is 180"),
        ({"num_clients": 2.0}, r"num_clients is 2\.0"),
        ({"num_clients": True}, "num_clients is True"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": -1.0}, "alpha is -1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": "0.1"}, "alpha is '0.1'"),
        ({"alpha": True}, "alpha is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, r"seed is 1\.5"),
    ],
)
def test_settings_out_of_range_are_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        make_clients(X, Y, **change)


def client(**change):
    rows = {"train_x": X[:4], "train_y": Y[:4], "test_x": X[4:6], "test_y": Y[4:6]}
    return Client(**({"id": "a"} | rows | change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_x": X[0]}, r"train split of client 'a': features are float32 \(64,\)"),
        ({"train_x": X[:4].astype(np.float64)}, r"features are float64 \(4, 64\)"),
        ({"test_x": X[:0]}, r"test split of client 'a': features are float32 \(0, 64\)"),
        ({"test_x": np.full((2, 64), np.nan, np.float32)}, "finite"),
        ({"test_x": np.full((2, 64), np.inf, np.float32)}, "finite"),
        ({"train_y": Y[:3]}, r"labels are int64 \(3,\); use int64 \[4\]"),
        ({"train_y": Y[:4].astype(np.int32)}, "labels are int32"),
        ({"train_y": Y[:4] - 10}, ">= 0"),
        ({"test_x": X[:2, :5].copy()}, "trains on 64 features and tests on 5"),
    ],
)
def test_a_client_holds_only_sound_samples(change, says):
    with pytest.raises(InvalidInputError, match=says):
        client(**change)


@example(num_clients=1, seed=0, scale=1.0, shift=624.4319575018467)
@example(num_clients=40, seed=0, scale=1.0, shift=1e6)
@given(
    num_clients=st.integers(1, 40),
    seed=st.integers(0, 99),
    scale=st.one_of(st.floats(1.0, 100.0), st.floats(1e-15, 1e15)),
    shift=st.one_of(st.floats(-1e3, 1e3), st.floats(-1e8, 1e8)),
)
@examples(25)
def test_statistics_from_sums_equal_those_of_the_pooled_samples(num_clients, seed, scale, shift):
    """To rounding, at any offset: sums of squares gave a constant feature at 624 a spread of
    1e-4."""
    x = (X * np.float32(scale) + np.float32(shift)).astype(np.float32)
    clients = make_clients(x, Y, num_clients=num_clients, seed=seed)
    pooled = np.concatenate([client.train_x for client in clients]).astype(np.longdouble)
    floor = 1e-30
    statistics = federated_statistics(clients, min_std=floor)
    size = np.abs(pooled).max()
    np.testing.assert_allclose(
        statistics["mean"], pooled.mean(axis=0).astype(float), rtol=1e-12, atol=1e-15 * size
    )
    varies = np.ptp(pooled, axis=0) > 0
    std = np.where(varies, pooled.std(axis=0), floor).astype(float)
    # two float64 means differ by rounding of their own size, all else by rounding of the spread
    np.testing.assert_allclose(statistics["std"], std, rtol=1e-12, atol=1e-15 * size)
    assert np.array_equal(statistics["std"], np.where(varies, statistics["std"], floor)), (
        "a constant is exactly one"
    )


@given(data=st.data(), seed=st.integers(0, 99), unit=st.integers(-40, 40))
@examples(50)
def test_statistics_are_in_the_unit_of_their_features_and_constant_ones_are_left_alone(
    data, seed, unit
):
    """As scikit-learn's StandardScaler says of the pooled samples; powers of two, so that nothing
    rounds."""
    scale = np.float32(2.0**unit)
    x = X.copy()
    x[:, 5] = data.draw(st.sampled_from([0.0, 0.1, -7e3, 1e6]))
    clients = make_clients(x * scale, Y, num_clients=data.draw(st.integers(1, 40)), seed=seed)
    scaler = StandardScaler().fit(
        np.concatenate([client.train_x for client in clients]).astype(np.float64)
    )
    statistics = federated_statistics(clients)
    np.testing.assert_allclose(statistics["std"], scaler.scale_, rtol=1e-9)
    assert statistics["std"][0] == statistics["std"][5] == 1.0
    assert statistics["mean"][5] == x[0, 5] * scale


def test_a_feature_that_varies_at_one_client_or_between_clients_only_is_scaled():
    """Each of the others sees a constant; all of them together do not."""
    x = np.full((4, 3), 5.0, np.float32)
    varied = x.copy()
    varied[:, 0] = [5, 5, 5, 9]
    varied[:, 1] = 6.0  # constant at every client, but not the same
    clients = [client(id=str(i), train_x=x, test_x=x[:2]) for i in range(3)]
    clients.append(client(id="odd", train_x=varied, test_x=varied[:2]))
    pooled = np.concatenate([one.train_x for one in clients]).astype(float)
    statistics = federated_statistics(clients)
    np.testing.assert_allclose(
        statistics["std"], [pooled[:, 0].std(), pooled[:, 1].std(), 1.0], rtol=1e-12
    )
    assert federated_statistics(clients[:3]) == {"mean": [5.0] * 3, "std": [1.0] * 3}


@pytest.mark.parametrize("rows", [X, X[:300]], ids=["all", "some"])
def test_a_pixel_that_varies_by_less_than_a_grey_level_is_not_blown_up(rows):
    """The digits' own resolution; a constant pixel is left as it is."""
    clients = make_clients(rows, Y[: len(rows)], num_clients=5)
    pooled = np.concatenate([one.train_x for one in clients]).astype(float)
    assert {one.resolution for one in clients} == {1.0}
    np.testing.assert_allclose(
        federated_statistics(clients)["std"], np.maximum(pooled.std(axis=0), 1), rtol=1e-12
    )
    assert {one.resolution for one in make_clients(rows / 16, Y[: len(rows)], num_clients=5)} == {
        0.0
    }


def test_a_floor_is_for_those_who_know_the_unit():
    x = np.array([[0, 0], [0, 2], [0, 4], [1, 6]], np.float32)
    one = client(train_x=x, test_x=x[:2])
    assert federated_statistics([one])["std"] == [np.sqrt(3 / 16), np.sqrt(5)]
    assert federated_statistics([one], min_std=1.0)["std"] == [1.0, np.sqrt(5)]
    assert federated_statistics([one], min_std=3.0)["std"] == [3.0, 3.0]
    assert federated_statistics([one], min_std=0.1)["std"] == [np.sqrt(3 / 16), np.sqrt(5)]


@pytest.mark.parametrize("min_std", [0, -1.0, float("nan"), float("inf"), "1"])
def test_the_floor_of_a_standard_deviation_is_a_positive_number(min_std):
    with pytest.raises(ConfigError, match="min_std"):
        federated_statistics([client()], min_std)


def test_statistics_need_clients_of_one_width():
    with pytest.raises(InvalidInputError, match=r"\[\]"):
        federated_statistics([])
    narrow = client(id="b", train_x=X[:4, :3].copy(), test_x=X[:2, :3].copy())
    with pytest.raises(InvalidInputError, match=r"\[3, 64\]"):
        federated_statistics([client(), narrow])


def test_digits_are_read_once():
    assert digits()[0] is datasets.digits()[0]
