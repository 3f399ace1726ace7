"""ServingConfig: the stated defaults, and every field refused just outside its bounds."""

import dataclasses
import math

import numpy as np
import pytest

from flserving import ServingConfig
from flserving.errors import ConfigError

# field -> lowest, highest; written down again on purpose, the module's own table is not the oracle
BOUNDS = {
    "max_batch_size": (1, 65_536),
    "max_wait_time_ms": (0, 60_000),
    "cache_size": (1, 10_000),
    "warmup_samples": (0, 10_000),
    "num_workers": (1, 256),
    "timeout_ms": (1, 3_600_000),
    "max_queue_rows": (1, 10_000_000),
    "max_request_rows": (1, 10_000_000),
    "cache_bytes": (1, 2**50),
    "prediction_cache_bytes": (0, 2**50),
    "prediction_cache_ttl_s": (0, 31_536_000),
    "head_cache_bytes": (1, 2**50),
}
REAL = ["max_wait_time_ms", "timeout_ms", "prediction_cache_ttl_s"]
WHOLE = sorted(BOUNDS.keys() - set(REAL))


def test_the_defaults_are_the_stated_ones():
    assert dataclasses.asdict(ServingConfig()) == {
        "max_batch_size": 32, "max_wait_time_ms": 100, "cache_size": 5, "warmup_samples": 10, "num_workers": 4,
        "timeout_ms": 5000, "batching": "work_conserving", "max_queue_rows": 4096, "max_request_rows": 16_384,
        "cache_bytes": 2**30, "prediction_cache_bytes": 0, "prediction_cache_ttl_s": 0,
        "prediction_cache_scope": "caller",
        "head_cache_bytes": 2**28, "unknown_client": "global_head", "outputs": "full", "engine": "torch",
    }  # fmt: skip


def test_every_field_is_tested_here():
    assert {field.name for field in dataclasses.fields(ServingConfig)} == {
        *BOUNDS,
        *CHOICES,
        "outputs",
    }


@pytest.mark.parametrize("name", BOUNDS)
def test_both_bounds_are_allowed_and_nothing_beyond(name):
    low, high = BOUNDS[name]
    for value in (low, low + 1, high - 1, high):
        assert getattr(ServingConfig(**{name: value}), name) == value
    for value in (low - 1, high + 1, -(10**400), 10**400):
        with pytest.raises(
            ConfigError, match=rf"^{name} is {value}: it must lie in \[{low}, {high}\] \(.+\)$"
        ):
            ServingConfig(**{name: value})


@pytest.mark.parametrize("name", REAL)
def test_fractions_are_allowed_where_time_is_meant(name):
    low, high = BOUNDS[name]
    for value in (low + 0.5, math.nextafter(high, 0), np.float64(low + 0.25)):
        assert getattr(ServingConfig(**{name: value}), name) == value
    for value in (
        math.nextafter(low, -1),
        math.nextafter(high, math.inf),
        math.nan,
        math.inf,
        -math.inf,
    ):
        with pytest.raises(ConfigError, match=f"^{name} is {value!r}: it must lie in"):
            ServingConfig(**{name: value})


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("value", [True, False, "5", None, [5], 5j, np.array([5]), b"5"], ids=repr)
def test_what_is_no_number_is_refused(name, value):
    wanted = "an int or a float" if name in REAL else "an int"
    with pytest.raises(ConfigError) as error:
        ServingConfig(**{name: value})
    assert str(error.value) == f"{name} is {value!r}: it must be {wanted}"


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [5.0, 5.5, math.nan, math.inf, np.int64(5)], ids=repr)
def test_counts_are_whole_python_numbers(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is .*: it must be an int$"):
        ServingConfig(**{name: value})


CHOICES = {
    "batching": ("work_conserving", "hold_until_full"),
    "unknown_client": ("global_head", "refuse"),
    "engine": ("torch", "numpy"),
    "prediction_cache_scope": ("caller", "shared"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_taken_by_their_names(name):
    for choice in CHOICES[name]:
        assert getattr(ServingConfig(**{name: choice}), name) == choice


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(
    "value", ["", "WORK_CONSERVING", "eager", None, 1, ["work_conserving"], np.array(["a", "b"])]
)
def test_another_choice_is_refused_and_all_are_named(name, value):
    with pytest.raises(
        ConfigError, match=f"^{name} is .*: choose one of {', '.join(CHOICES[name])}$"
    ):
        ServingConfig(**{name: value})


def test_a_config_never_changes_and_works_as_a_key():
    config = ServingConfig(cache_size=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cache_size = 4
    with pytest.raises((AttributeError, TypeError)):  # slots
        object.__setattr__(config, "no_such_setting", 1)
    assert (
        config == ServingConfig(cache_size=3) != ServingConfig()
        and len({config, ServingConfig(cache_size=3)}) == 1
    )


def test_a_changed_copy_is_validated_too():
    with pytest.raises(ConfigError, match=r"^num_workers is 0"):
        dataclasses.replace(ServingConfig(), num_workers=0)


def test_settings_have_names_and_unknown_ones_are_refused():
    with pytest.raises(TypeError):
        ServingConfig(32)
    with pytest.raises(TypeError, match="max_batchsize"):
        ServingConfig(max_batchsize=32)
