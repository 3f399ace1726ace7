"""What of the door to Ray needs no Ray: its words where something is missing or too small."""

import os
import sys

import pytest

from flserving import Registry, models
from flserving.errors import ConfigError
from flserving.integrations import ray


@pytest.fixture
def folder(tmp_path):
    with Registry(tmp_path) as registry:
        registry.publish(
            "m", models.build("tutorial_mlp"), architecture="tutorial_mlp", alias="default"
        )
    return str(tmp_path)


@pytest.fixture
def without_ray(monkeypatch):
    # what Ray would read at its import is taken back
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "ray", None)


def test_without_ray_the_words_say_what_to_install(folder, without_ray, capsys):
    assert ray.main(["--registry", folder, "--no-token"]) == 1
    assert 'ray is not installed: pip install "flserving[ray]"' in capsys.readouterr().err


def test_options_come_from_the_environment_as_those_of_serve(
    folder, without_ray, monkeypatch, capsys
):
    for name, value in (("REGISTRY", folder), ("NO_TOKEN", "1"), ("MAX_REPLICAS", "0")):
        monkeypatch.setenv(f"FLSERVING_{name}", value)
    assert ray.main([]) == 1
    assert "max_replicas is 0" in capsys.readouterr().err


def test_a_wrong_token_file_is_told(folder, without_ray, capsys):
    assert ray.main(["--registry", folder, "--token-file", f"{folder}/none.json"]) == 1
    assert "cannot read the tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min_replicas": 0}, r"min_replicas is 0: use an integer in \[1, 1000\]"),
        (
            {"min_replicas": 3, "max_replicas": 2},
            r"max_replicas is 2: use an integer in \[3, 1000\]",
        ),
        ({"ongoing": 0.5}, "ongoing is 0.5"),
    ],
)
def test_a_scale_is_checked_when_it_is_made(given, words):
    with pytest.raises(ConfigError, match=words):
        ray.Scale(**given)


@pytest.mark.parametrize(
    ("cores", "memory", "words"),
    [
        (
            2,
            64 << 30,
            "max_replicas is 3: they take 3 cores, Ray has 2: take at most 2 replicas, or add machines",
        ),
        (
            8,
            1 << 30,
            "they take 1610612736 bytes of memory, Ray has 1073741824: take at most 2 replicas",
        ),
        (0, 0, "Ray has 0: take at most 0 replicas"),
    ],
)
def test_too_few_cores_and_too_little_memory_are_told(cores, memory, words):
    with pytest.raises(ConfigError, match=words):
        ray.check_room({"CPU": cores, "memory": memory}, ray.Scale(max_replicas=3))


def test_what_is_there_just_suffices():
    ray.check_room({"CPU": 3.0, "memory": 3.0 * ray.REPLICA_BYTES}, ray.Scale(max_replicas=3))
