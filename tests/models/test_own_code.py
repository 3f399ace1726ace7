"""A user's own architecture is served by the commands: ``--import mynet`` runs the module that
registers it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flserving
from edge_cloud import cloud
from flserving import Registry, models
from flserving.api.client import Client
from flserving.errors import ConfigError, FlservingError
from flserving.models.own_code import import_modules
from serving_models import wait_until
from serving_processes import running

MYNET = """
import torch
from flserving import models

@models.register("mynet-{}", input_shape=(4,), output_shape=(3,))
class MyNet(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        return super().forward(x) + 1
"""
ROW = np.ones((1, 4), np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with modules in it; what is imported and registered here is forgotten
    afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(models.architectures, "_known", dict(models.architectures._known))
    (tmp_path / "mynet.py").write_text(MYNET.format("a"))
    (tmp_path / "othernet.py").write_text(MYNET.format("b"))
    (tmp_path / "empty.py").write_text("answer = 42\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needs.py").write_text("import a_package_that_nobody_has\n")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def published(folder):
    """A registry with one version of each of the two, and what they answer."""
    import_modules(["mynet", "othernet"])
    root, wanted = folder / "models", {}
    with Registry(root) as registry:
        for name in ("mynet-a", "mynet-b"):
            torch.manual_seed(0)
            module = models.build(name)
            registry.publish(name, module, architecture=name, alias="default")
            wanted[name] = module(torch.from_numpy(ROW)).softmax(1).tolist()
    return root, wanted


def test_serve_imports_in_every_worker(folder):
    root, wanted = published(folder)
    with running(root, "--workers", 2, "--import", "mynet", "--import", "othernet") as served:
        for _ in range(6):  # a new connection each: the kernel spreads them over the workers
            with Client(served.url, served.token) as client:
                for name, probabilities in wanted.items():
                    found = client.predict(ROW, model=name)["probabilities"]
                    np.testing.assert_allclose(found, probabilities, rtol=1e-5)
        assert served.end() == 0


def command(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "flserving", *arguments], capture_output=True, text=True, timeout=300, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(flserving.__file__).parents[1])},
    )  # fmt: skip


def test_the_commands_say_what_is_wrong_with_an_import(folder):
    root, _ = published(folder)
    name, reason = "empty", "registers no architecture"
    served = command(folder, "serve", "--registry", str(root), "--import", name)
    assert served.returncode == 1 and reason in served.stderr and "Traceback" not in served.stderr
    device = command(
        folder,
        "edge",
        "--cloud",
        "http://127.0.0.1:9",
        "--client",
        "c-1",
        "--directory",
        "device",
        "--import",
        name,
    )
    assert device.returncode == 1 and reason in device.stderr and "Traceback" not in device.stderr


def test_a_device_imports_too(folder):
    import_modules(["mynet"])
    module = models.build("mynet-a")
    with Registry(folder / "cloud") as registry:
        registry.publish(
            "digits", module, architecture="mynet-a", alias="default", lineage={"round": 1}
        )
    with cloud(folder / "cloud") as (_, served):
        process = subprocess.Popen(
            [sys.executable, "-m", "flserving", "edge", "--cloud", served.url, "--client", "c-1", "--directory",
             "device", "--import", "mynet", "--poll-s", "0.2"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(flserving.__file__).parents[1]),
                 "FLSERVING_CLOUD_TOKEN": "c-1"},
        )  # fmt: skip
        try:
            url, _, token = (process.stdout.readline().split()[1] for _ in range(3))
            with Client(url, token) as client:

                def answered():
                    try:
                        return client.predict(ROW)
                    except FlservingError:
                        return None

                wait_until(lambda: answered() is not None, "an answer of the pulled model")
                wanted = module(torch.from_numpy(ROW)).softmax(1).tolist()
                np.testing.assert_allclose(answered()["probabilities"], wanted, rtol=1e-5)
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "there is no module 'nowhere', neither installed nor in "),
        ("mynet.inner", "mynet"),
        ("mynet.py", "there is no module 'mynet.py'|failed"),
        ("my net", "no module's name"),
        ("../mynet", "no module's name"),
        ("empty", r"registers no architecture: decorate yours with flserving\.models\.register"),
        ("broken", "failed: ZeroDivisionError"),
        ("needs", "needs a module 'a_package_that_nobody_has' that is not installed"),
    ],
)
def test_what_cannot_be_imported_is_typed(folder, name, reason):
    with pytest.raises(ConfigError, match=reason):
        import_modules([name])


def test_the_same_import_again_is_fine_and_runs_nothing(folder):
    import_modules(["mynet", "mynet"])
    import_modules(["mynet"])
    assert "mynet-a" in models.names()


def test_an_unknown_architecture_says_how_to_bring_it(folder):
    with pytest.raises(FlservingError, match="--import MODULE"):
        models.build("mynet-a")
