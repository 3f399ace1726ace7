"""Loading: any module comes back as it was, a torn file never does, a failed load leaves what was
there."""

import copy
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from flserving import ModelCache, Postprocessor, Preprocessor, Registry, ServingConfig, models
from flserving.errors import (
    ConflictError,
    CorruptArtifactError,
    FlservingError,
    InvalidModelError,
    ModelExecutionError,
    NotFoundError,
)
from flserving.registry import validation
from flserving.serving.loader import ModuleStore, RegistrySource, input_width, load_engine
from serving_models import PATIENCE_S

CONFIG = ServingConfig(warmup_samples=1, max_batch_size=4)
X = torch.from_numpy(np.random.default_rng(0).standard_normal((7, 8)).astype(np.float32))


@pytest.fixture
def store():
    return ModuleStore()


def add(
    store: ModuleStore,
    module: nn.Module,
    version: str = "v1",
    features: int | None = 8,
    **policy: object,
) -> None:
    store.add(version, module, Preprocessor(num_features=features), Postprocessor(**policy))


def served(store: ModuleStore, version: str = "v1") -> torch.Tensor:
    """The probabilities that the stored module gives X, in batches of 4 and 3 rows."""
    return torch.tensor(load_engine(store, version, CONFIG).predict(X)["probabilities"])


def expected(module: nn.Module) -> torch.Tensor:
    """What the module itself says."""
    was = module.training
    with torch.no_grad():
        out = torch.cat([module.eval()(X[:4].clone()), module(X[4:].clone())])
    module.train(was)
    return torch.softmax(out.float(), 1)


# Any module comes back


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = (
            nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True),
            nn.Linear(10, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x.view(len(x), 2, 4))[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(x)))


class Buffers(nn.Module):
    """Buffers in the state dict and outside of it, of odd dtypes and shapes, and a mask of minus
    infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.register_buffer("scale", torch.randn(8), persistent=False)
        self.register_buffer("keep", torch.tensor([True, False, True] * 2 + [True] * 2))
        self.register_buffer("mask", torch.tensor([0, 0, -math.inf]), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            self.head(x * self.scale * self.keep * self.count * self.phase.real.sum()) + self.mask
        )


class Strided(nn.Module):
    """Weights that are views: transposed, expanded, a slice of something larger."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 8).T), nn.Parameter(torch.randn(1).expand(3))
        self.c = nn.Parameter(torch.randn(10, 10)[2:5, 4])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w + self.b + self.c


class Attributes(nn.Module):
    """State that torch does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.factor, self.parts, self.shift = (
            nn.Linear(8, 3),
            2.5,
            [torch.randn(3)],
            torch.randn(3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) * self.factor + self.parts[0] + self.shift


class Bfloat16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.bfloat16())


def batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    model(torch.randn(64, 8) * 3 + 1)  # running statistics
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 3))
    model[0].register_forward_hook(lambda layer, args, out: out * 2)
    return model


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def layer_used_twice() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer)


def attention() -> nn.Module:
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.TransformerEncoder(block, 2), nn.Flatten(), nn.Linear(8, 3)
    )


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv1d(1, 2, 3),
        nn.BatchNorm1d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 3),
    "built-in": lambda: models.build("mlp", {"sizes": [8, 16, 3]}),
    "batch norm and dropout": batch_norm,
    "lstm": Recurrent,
    "attention": attention,
    "convolution": convolution,
    "tied weights": Tied,
    "a layer used twice": layer_used_twice,
    "buffers": Buffers,
    "strided weights": Strided,
    "plain attributes": Attributes,
    "bfloat16 inside": Bfloat16,
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 3)
    ),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 3))),
    "orthogonal": lambda: nn.Sequential(
        parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 3)
    ),
    "pruned": pruned,
    "hooks": hooked,
    "data parallel": lambda: nn.DataParallel(nn.Linear(8, 3)),
    "frozen": lambda: nn.Linear(8, 3).requires_grad_(False),
    "no weights": nn.Identity,
}


@pytest.mark.parametrize("kind", MODULES)
def test_any_module_comes_back_as_it_was(store, kind):
    torch.manual_seed(0)
    module = MODULES[kind]()
    module.train()
    wanted = expected(module)
    add(store, module)
    got = served(store)
    if kind == "strided weights":  # stored contiguously: a product may sum in another order
        torch.testing.assert_close(got, wanted)
    else:
        assert torch.equal(got, wanted)
    assert all(part.training for part in module.modules()), (
        "the caller's module is read, not changed"
    )
    assert torch.equal(served(store), got), "and it comes back again"


@pytest.mark.parametrize("kind", MODULES)
def test_two_loads_share_no_weights_with_the_module_nor_with_each_other(store, kind):
    module = MODULES[kind]()
    add(store, module)
    one, two = (load_engine(store, "v1", CONFIG).model for _ in range(2))
    places = [
        {t.data_ptr() for t in [*m.parameters(), *m.buffers()] if t.numel()}
        for m in (module, one, two)
    ]
    assert not places[0] & places[1] and not places[1] & places[2]
    assert {name for name, _ in one.named_parameters()} == {
        name for name, _ in module.named_parameters()
    }
    assert all(type(p) is nn.Parameter for p in one.parameters())
    assert one.state_dict().keys() == module.state_dict().keys()


def test_training_after_the_add_does_not_reach_the_stored_module(store):
    module = nn.Linear(8, 3)
    wanted = expected(module)
    add(store, module)
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(served(store), wanted)


def test_a_module_in_training_keeps_its_gradients(store):
    module = nn.Linear(8, 3)
    module(X).sum().backward()
    gradient = module.weight.grad.clone()
    add(store, module)
    assert torch.equal(module.weight.grad, gradient) and module.weight.requires_grad


def test_an_engine_is_loaded_with_the_settings_and_transforms_of_its_version(store):
    store.add(
        "v1",
        nn.Linear(8, 3),
        Preprocessor(mean=[1] * 8, std=[2] * 8),
        Postprocessor(threshold=0.25),
    )
    engine = load_engine(store, "v1", ServingConfig(max_batch_size=5, warmup_samples=3))
    assert (engine.version, engine.max_batch_size, engine.config.warmup_samples) == ("v1", 5, 3)
    assert engine.get_stats()["warmup_executions"] == 4 and engine.typical_s < math.inf
    assert engine.preprocessor.num_features == 8 and engine.postprocessor.threshold == 0.25
    assert engine.predict(X)["model_version"] == "v1"


# Versions


def test_versions_are_listed_in_their_order_and_unknown_ones_are_typed(store):
    with pytest.raises(NotFoundError, match="no version 'v1': loaded are none"):
        store.parts("v1")
    for version in ("b", "a", "c"):
        add(store, nn.Linear(8, 3), version)
    assert store.versions() == ["b", "a", "c"]
    with pytest.raises(NotFoundError, match="no version 'v1': loaded are b, a, c"):
        load_engine(store, "v1", CONFIG)


def test_the_same_module_again_is_fine(store):
    for module in (nn.Linear(8, 3), Recurrent(), Attributes(), pruned(), hooked()):
        version = type(module).__name__ + str(len(store.versions()))
        add(store, module, version)
        add(store, module, version)
        add(store, module.eval(), version)
    assert len(store.versions()) == 5


def test_a_copy_that_cannot_answer_otherwise_is_the_same_module(store):
    module = models.build("mlp", {"sizes": [8, 4, 3]})
    twin = models.build("mlp", {"sizes": [8, 4, 3]})
    twin.load_state_dict(module.state_dict())
    add(store, module)
    add(store, twin)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def redefined(factor: float) -> nn.Module:
    """A class of the same name with another forward, as after editing a notebook's cell."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * factor

    return Net()


def rehooked(factor: float) -> nn.Module:
    module = nn.Sequential(nn.Identity())
    module[0].register_forward_hook(lambda layer, args, out: out * factor)
    return module


EQUAL_WEIGHTS = {
    "another activation": (lambda: nn.Sequential(nn.ReLU()), lambda: nn.Sequential(nn.Tanh())),
    "another setting of a layer": (lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.2)),
    "another attribute": (lambda: Scaled(2), lambda: Scaled(3)),
    "a class defined anew": (lambda: redefined(2), lambda: redefined(3)),
    "another hook": (lambda: rehooked(2), lambda: rehooked(3)),
    "another order": (
        lambda: nn.Sequential(nn.ReLU(), nn.Tanh()),
        lambda: nn.Sequential(nn.Tanh(), nn.ReLU()),
    ),
}


@pytest.mark.parametrize("kind", EQUAL_WEIGHTS)
def test_equal_weights_under_other_code_are_another_model(store, kind):
    first, second = (make() for make in EQUAL_WEIGHTS[kind])
    add(store, first)
    with pytest.raises(
        ConflictError, match="version 'v1' exists and versions do not change: choose another id"
    ):
        add(store, second)
    add(store, second, "v2")
    assert torch.equal(served(store), expected(first)) and torch.equal(
        served(store, "v2"), expected(second)
    )
    engines = [load_engine(store, version, CONFIG) for version in ("v1", "v2", "v1")]
    assert engines[0].identity != engines[1].identity, (
        "a cached answer of one would be given for the other"
    )
    assert engines[0].identity == engines[2].identity, (
        "a version that comes back finds its cached answers"
    )


def test_other_weights_statistics_policy_or_width_are_another_model(store):
    module = nn.Flatten()
    store.add("v1", module, Preprocessor(mean=[0, 0], std=[1, 1]), Postprocessor())
    others = [
        (module, Preprocessor(mean=[0, 1], std=[1, 1]), Postprocessor()),
        (module, Preprocessor(num_features=2), Postprocessor()),
        (module, Preprocessor(mean=[0, 0], std=[1, 1]), Postprocessor(threshold=0.1)),
        (module, Preprocessor(mean=[0, 0], std=[1, 1]), Postprocessor("regression")),
        (module, Preprocessor(normalize=False, mean=[0] * 3, std=[1] * 3), Postprocessor()),
        (nn.Linear(2, 2), Preprocessor(mean=[0, 0], std=[1, 1]), Postprocessor()),
    ]
    for other in others:
        with pytest.raises(ConflictError):
            store.add("v1", *other)
    store.add("v1", module, Preprocessor(mean=[0, 0], std=[1, 1]), Postprocessor())
    store.add("v2", module, Preprocessor(num_features=2), Postprocessor())
    with pytest.raises(ConflictError):
        store.add("v2", module, Preprocessor(num_features=3), Postprocessor())
    assert len(store.versions()) == 2


@pytest.mark.parametrize("version", ["v1.0", "1", "A", "a-b_c.d", "0" * 64])
def test_good_ids(store, version):
    add(store, nn.Linear(8, 3), version)
    assert store.versions() == [version]


@pytest.mark.parametrize(
    "version",
    [
        "",
        ".",
        "..",
        "a..b",
        "-a",
        "_a",
        ".a",
        "a/b",
        "a\\b",
        "a b",
        "a\n",
        "\0",
        "ä",
        "%2e",
        "0" * 65,
        None,
        1,
        b"v",
        ["v"],
    ],
    ids=repr,
)
def test_bad_ids_are_refused_and_nothing_is_stored(store, version):
    with pytest.raises(InvalidModelError, match=r"version id .*: use up to 64 letters"):
        add(store, nn.Linear(8, 3), version)
    assert store.versions() == []


def test_eight_threads_add_at_once(store):
    barrier, modules = threading.Barrier(8), [nn.Linear(8, 3) for _ in range(8)]

    def work(i: int) -> list[str]:
        barrier.wait(PATIENCE_S)
        outcomes = []
        for turn in range(5):
            add(store, modules[i], f"own-{i}-{turn}")
            try:
                add(store, modules[i], f"shared-{turn}")
                outcomes.append(i)
            except ConflictError:
                outcomes.append(None)
        return outcomes

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(work, range(8)))
    assert len(store.versions()) == 45
    for turn in range(5):
        (winner,) = {each[turn] for each in outcomes} - {None}
        assert torch.equal(served(store, f"shared-{turn}"), expected(modules[winner]))
    for i in range(8):
        assert torch.equal(served(store, f"own-{i}-4"), expected(modules[i]))


class Fails(nn.Module):
    """Fails in its forward with an error, or with what a function raises."""

    def __init__(self, error: BaseException | Callable[[], None]) -> None:
        super().__init__()
        self.error = error

    def __deepcopy__(self, memo: dict) -> nn.Module:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error if isinstance(self.error, BaseException) else self.error()


def test_who_adds_an_id_while_another_fails_with_it_gets_it(store):
    trying, go_on = threading.Event(), threading.Event()

    def fail() -> None:
        trying.set()
        assert go_on.wait(PATIENCE_S)
        raise RuntimeError("after all")

    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(add, store, Fails(fail))
        assert trying.wait(PATIENCE_S)
        good = pool.submit(add, store, module := nn.Linear(8, 3))
        while not good.running():
            pass
        go_on.set()
        assert isinstance(failing.exception(20), InvalidModelError) and good.result(20) is None
    assert torch.equal(served(store), expected(module)) and store.versions() == ["v1"]


# What cannot be stored


def non_finite(value: float) -> nn.Module:
    module = nn.Linear(8, 3)
    with torch.no_grad():
        module.weight[1, 2] = value
    return module


def locked() -> nn.Module:
    module = nn.Linear(8, 3)
    module.lock = threading.Lock()
    return module


UNFIT = {
    "not a module": (lambda: torch.zeros(3), "model is a Tensor: pass a torch"),
    "a class": (lambda: nn.Linear, "model is a type"),
    "another width": (
        lambda: nn.Linear(5, 3),
        r"does not answer a row of 8 features \(mat1 and mat2 .*1x8 and 5x3",
    ),
    "half": (lambda: nn.Linear(8, 3).half(), "Float and Half.*: it must take float32"),
    "bfloat16": (lambda: nn.Linear(8, 3).bfloat16(), "Float and BFloat16"),
    "double": (lambda: nn.Linear(8, 3).double(), "Float and Double"),
    "no forward": (nn.ModuleDict, 'missing the required "forward"'),
    "one number a row": (lambda: nn.Flatten(0), r"answered shape \(8,\) to 1 rows"),
    "NaN weights": (lambda: non_finite(math.nan), "weights 'weight' are not finite"),
    "infinite weights": (lambda: non_finite(math.inf), "weights 'weight' are not finite"),
    "a lock inside": (locked, "cannot store the Linear: .*cannot pickle"),
    "uninitialised": (lambda: nn.LazyLinear(3), "cannot store the LazyLinear"),
    "it raises": (lambda: Fails(KeyError("no such key")), "no such key"),
    "it runs out of memory": (lambda: Fails(MemoryError()), "does not answer a row of 8 features"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_served_is_refused_at_once_and_leaves_nothing(store, kind):
    make, seen = UNFIT[kind]
    with pytest.raises(InvalidModelError, match=seen):
        add(store, make())
    assert store.versions() == []
    add(store, nn.Linear(8, 3))  # the id is free
    assert store.versions() == ["v1"]


def test_an_interrupted_add_leaves_nothing(store):
    with pytest.raises(KeyboardInterrupt):
        add(store, Fails(KeyboardInterrupt()))
    assert store.versions() == []


def test_the_input_width_is_that_of_a_first_linear_layer(store):
    assert input_width(nn.Linear(7, 3)) == 7
    assert (
        input_width(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(5, 2), nn.Linear(2, 9)))
        == 5
    )
    assert input_width(models.build("tutorial_mlp")) == 32
    assert input_width(nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 2)))) == 6
    store.add("v1", nn.Linear(7, 3), Preprocessor(), Postprocessor())
    assert store.parts("v1").preprocessor.num_features == 7


@pytest.mark.parametrize(
    "kind", ["convolution", "lstm", "no weights", "data parallel of a batch norm", "embedding"]
)
def test_elsewhere_only_the_caller_knows_it(store, kind):
    others = {
        "data parallel of a batch norm": lambda: nn.DataParallel(nn.BatchNorm1d(8)),
        "embedding": lambda: nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 3)),
    }
    with pytest.raises(
        InvalidModelError, match="cannot be told from its first layer: pass num_features"
    ):
        store.add("v1", (MODULES | others)[kind](), Preprocessor(), Postprocessor())


def test_a_failed_load_leaves_what_was_there(store):
    cache = ModelCache(2)
    add(store, nn.Linear(8, 3))
    add(store, non_finite(0.5), "v2")
    with cache.lease("v1", lambda: load_engine(store, "v1", CONFIG)) as serving:
        with torch.no_grad():
            store._stored["v2"].module.weight[0, 0] = math.nan
        for _ in range(3):
            with (
                pytest.raises(CorruptArtifactError),
                cache.lease("v2", lambda: load_engine(store, "v2", CONFIG)),
            ):
                pass
    assert (
        cache.get("v1") is serving
        and len(cache) == 1
        and serving.predict(X)["model_version"] == "v1"
    )


# Versions of a registry


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def allow_list(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(models.architectures, "_known", dict(models.architectures._known))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tutorial_mlp", {}),
        ("digits_mlp", {}),
        ("digits_cnn", {}),
        ("mlp", {"sizes": [8, 300, 300, 3]}),
    ],
)
def test_a_published_version_answers_as_the_trained_module_bit_for_bit(registry, name, parameters):
    trained = models.build(name, parameters)
    registry.publish("m", trained, architecture=name, parameters=parameters)
    engine = load_engine(RegistrySource(registry, "m"), "1", ServingConfig())
    (features,), _ = models.signature(name, parameters)
    x = torch.randn(32, features)
    with torch.no_grad():
        assert engine.predict(x)["probabilities"] == torch.softmax(trained(x), 1).tolist()
    assert (engine.version, engine.preprocessor.num_features, engine.max_batch_size) == (
        "1",
        features,
        32,
    )
    assert engine.nbytes == sum(t.nbytes for t in trained.state_dict().values())


def test_versions_are_those_of_the_registry(registry):
    source = RegistrySource(registry, "m")
    assert source.versions() == []
    for _ in range(3):
        registry.publish("m", models.build("digits_mlp"), architecture="digits_mlp")
    assert source.versions() == ["1", "2", "3"]
    with pytest.raises(NotFoundError):
        load_engine(source, "4", CONFIG)


def test_statistics_output_type_and_threshold_come_with_the_version(registry):
    sizes = {"sizes": [2, 1]}
    registry.publish(
        "m",
        models.build("mlp", sizes),
        architecture="mlp",
        parameters=sizes,
        preprocessing={"mean": [1, 2], "std": [3, 0]},
        output_type="regression",
    )
    engine = load_engine(RegistrySource(registry, "m"), "1", CONFIG)
    assert (
        engine.preprocessor([4, 7]).tolist() == [[1, 5]]
        and engine.postprocessor.output_type == "regression"
    )
    assert engine.preprocessor.digest == registry.manifest("m", 1).digests.preprocessing, (
        "served as trained"
    )
    two = {"sizes": [2, 2]}
    registry.publish("c", models.build("mlp", two), architecture="mlp", parameters=two)
    assert (
        load_engine(
            RegistrySource(registry, "c", threshold=0.75), "1", CONFIG
        ).postprocessor.threshold
        == 0.75
    )


class WithBuffers(nn.Module):
    """Buffers that no file holds: each start has to make them anew; ``plain`` ones are mere
    attributes."""

    def __init__(self, width: int, activation: str = "relu", plain: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, width), nn.Linear(width, 3)
        if plain:
            self.ramp, self.gain, self.activation = torch.linspace(0, 1, width), 1.5, torch.relu
            return
        self.register_buffer("ramp", torch.linspace(0, 1, width), persistent=False)
        self.register_buffer("gain", nn.init.constant_(torch.empty(width), 1.5), persistent=False)
        self.register_buffer("seen", torch.tensor(0))
        self.activation = getattr(torch, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.activation(self.body(x)) * self.ramp * self.gain)


@pytest.mark.parametrize("width", [4, 8192], ids=["small", "large enough to skip initialisation"])
def test_a_users_own_architecture_comes_back_with_the_buffers_that_no_file_holds(
    registry, allow_list, width
):
    models.register("with_buffers", input_shape=(8,), output_shape=(3,))(WithBuffers)
    trained = WithBuffers(width)
    trained.seen += 7
    manifest = registry.publish(
        "m", trained, architecture="with_buffers", parameters={"width": width}
    )
    assert (manifest.weights_nbytes > 1 << 18) == (width == 8192)
    for _ in range(3):  # memory that was used before is not zero
        engine = load_engine(RegistrySource(registry, "m"), "1", CONFIG)
        with torch.no_grad():
            assert torch.equal(engine.model(X), trained(X)) and engine.model.seen == 7


def test_a_users_own_architecture_comes_back_with_tensors_that_are_mere_attributes(
    registry, allow_list
):
    models.register("plain", input_shape=(8,), output_shape=(3,))(WithBuffers)
    trained, parameters = WithBuffers(8192, plain=True), {"width": 8192, "plain": True}
    registry.publish("m", trained, architecture="plain", parameters=parameters)
    with torch.no_grad():
        assert torch.equal(
            load_engine(RegistrySource(registry, "m"), "1", CONFIG).model(X), trained(X)
        )


def test_equal_weights_under_another_architecture_or_other_parameters_share_no_cached_answers(
    registry, allow_list
):
    models.register("one", input_shape=(8,), output_shape=(3,))(WithBuffers)
    models.register("two", input_shape=(8,), output_shape=(3,))(WithBuffers)
    trained = WithBuffers(4)
    for architecture, activation in (
        ("one", "relu"),
        ("one", "tanh"),
        ("two", "relu"),
        ("one", "relu"),
    ):
        registry.publish(
            "m",
            trained,
            architecture=architecture,
            parameters={"width": 4, "activation": activation},
        )
    source = RegistrySource(registry, "m")
    identities = [load_engine(source, version, CONFIG).identity for version in source.versions()]
    assert len(set(identities)) == 3 and identities[0] == identities[3]


def test_an_architecture_that_this_process_does_not_know_is_typed(registry, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(models.architectures, "_known", dict(models.architectures._known))
        models.register("gone", input_shape=(8,), output_shape=(3,))(WithBuffers)
        registry.publish("m", WithBuffers(4), architecture="gone", parameters={"width": 4})
    with pytest.raises(NotFoundError, match=r"no architecture 'gone'.*models\.register"):
        load_engine(RegistrySource(registry, "m"), "1", CONFIG)


def test_an_architecture_that_changed_since_is_typed(registry, allow_list, monkeypatch):
    models.register("changes", input_shape=(8,), output_shape=(3,))(WithBuffers)
    registry.publish("m", WithBuffers(4), architecture="changes", parameters={"width": 4})
    models.architectures._known["changes"] = models.architectures.Architecture(
        "changes", lambda width: nn.Linear(8, 3), (8,), (3,), 1 << 28
    )
    with pytest.raises(
        CorruptArtifactError,
        match=r"m version 1 does not fit its architecture 'changes': (?s:.*)Unexpected key",
    ):
        load_engine(RegistrySource(registry, "m"), "1", CONFIG)


def test_a_model_that_does_not_run_is_found_at_the_publish_and_if_it_is_there_at_the_load(
    registry, allow_list, monkeypatch
):
    class Broken(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("only here")

    models.register("broken", input_shape=(8,), output_shape=(3,))(lambda: Broken(8, 3))
    with pytest.raises(InvalidModelError, match=r"does not answer a row of shape.*only here"):
        registry.publish("m", Broken(8, 3), architecture="broken")
    # as by a flserving that did not look
    monkeypatch.setattr(validation, "_check_service", lambda *_: None)
    registry.publish("m", Broken(8, 3), architecture="broken")
    with pytest.raises(ModelExecutionError, match="model '1' failed on rows of shape"):
        load_engine(RegistrySource(registry, "m"), "1", CONFIG)


def test_a_torn_version_is_typed_and_the_one_before_goes_on_serving(registry, tmp_path):
    for _ in range(2):
        registry.publish("m", models.build("digits_mlp"), architecture="digits_mlp")
    source, cache = RegistrySource(registry, "m"), ModelCache(2)
    x = np.ones((2, 64), np.float32)
    with cache.lease("1", lambda: load_engine(source, "1", CONFIG)) as engine:
        wanted = engine.predict(x)["probabilities"]
    (weights,) = (tmp_path / "registry").rglob("m/2/*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-3] ^= 4
    weights.chmod(0o644)
    weights.write_bytes(data)
    with (
        pytest.raises(CorruptArtifactError),
        cache.lease("2", lambda: load_engine(source, "2", CONFIG)),
    ):
        pass
    assert cache.get("1") is engine and engine.predict(x)["probabilities"] == wanted


def test_every_error_of_a_load_is_one_of_ours(store):
    """What a source raises goes through; nothing is wrapped twice."""

    class Broken:
        def versions(self) -> list[str]:
            return ["1"]

        def parts(self, version: str) -> None:
            raise CorruptArtifactError("as the source says it")

    with pytest.raises(FlservingError, match=r"^as the source says it$"):
        load_engine(Broken(), "1", CONFIG)


def test_a_deep_copy_of_a_loaded_module_is_possible(store):
    add(store, Recurrent())
    assert torch.equal(
        copy.deepcopy(load_engine(store, "v1", CONFIG).model)(X),
        load_engine(store, "v1", CONFIG).model(X),
    )
