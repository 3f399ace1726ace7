"""A JupyterLab of our own for the browser tests: its own folders, port and token; nothing of the
user's is read."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOKEN = "browser-tests"  # the server listens on loopback and lives as long as the tests
START_TIMEOUT_S = 90
SETTINGS = {
    # no news pop-up, no look-up of newer versions
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    # every cell is in the page, not only those in view
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


@dataclass(frozen=True)
class LabServer:
    """Where a running JupyterLab answers."""

    base_url: str

    def notebook_url(self, name: str) -> str:
        """Address of a notebook of the served folder, in a workspace of its own."""
        return f"{self.base_url}/lab/workspaces/{Path(name).stem}/tree/{name}?reset&token={TOKEN}"

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"{self.base_url}/api/status?token={TOKEN}", timeout=2
            ) as reply:
                return reply.status == 200
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def lab_server(notebooks: Path, home: Path) -> Iterator[LabServer]:
    """Serve the folder ``notebooks``; everything else that JupyterLab writes goes below
    ``home``."""
    overrides = home / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps(SETTINGS))
    environment = dict(
        os.environ,
        JUPYTER_CONFIG_DIR=str(home / "config"),
        JUPYTER_DATA_DIR=str(home / "data"),
        JUPYTER_RUNTIME_DIR=str(home / "run"),
        JUPYTERLAB_SETTINGS_DIR=str(home / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(home / "workspaces"),
        IPYTHONDIR=str(home / "ipython"),
        JUPYTER_PREFER_ENV_PATH="1",
    )
    environment.pop("FLSERVING_STATIC", None)  # here the sliders themselves are wanted
    server = LabServer(f"http://127.0.0.1:{_free_port()}")
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
        f"--port={server.base_url.rpartition(':')[2]}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={notebooks}",
        "--LabApp.expose_app_in_browser=True",  # as window.jupyterapp
    ]
    log_path = home / "jupyterlab.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + START_TIMEOUT_S
            while not server.answers():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(
                        f"JupyterLab did not start, its last lines:\n{log_path.read_text()[-3000:]}"
                    )
                time.sleep(0.2)
            yield server
        finally:
            process.terminate()  # it ends its kernels
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
