"""What may be served: architectures, weights, what happens to numbers before and after the model,
and the checks.

``architectures.py`` is the allow-list that a manifest names; read it first. ``modules.py`` is what
torch makes of an architecture; ``plain.py`` what NumPy does, for devices without torch: nothing
imports torch before it is needed. ``weights.py`` turns a state dict into bytes and back.
``processing.py`` holds the preprocessor and the postprocessor: here and not in ``serving``, because
a version is published with them, and the registry refuses statistics that do not fit and a model
that no server could answer with. ``probing.py`` asks whether each row is answered by itself. For
notebook 09: ``onnx.py``. For commands that register architectures of your own: ``own_code.py``.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

from flserving.models import plain
from flserving.models.plain import JSON, EngineName, Parameters, Shape

if TYPE_CHECKING:
    from flserving.models import modules
    from flserving.models.architectures import (
        Architecture,
        SplitModel,
        as_split,
        build,
        definition,
        describe,
        digits_cnn,
        digits_mlp,
        mlp,
        names,
        register,
        restore,
        sequential,
        signature,
        tutorial_mlp,
    )

Blueprint: TypeAlias = "plain.Blueprint | modules.Blueprint"
Runner: TypeAlias = "plain.NumpyModel | modules.Runner"

__all__ = [
    "JSON",
    "Architecture",
    "Blueprint",
    "EngineName",
    "Parameters",
    "Runner",
    "Shape",
    "SplitModel",
    "as_split",
    "blueprint",
    "build",
    "definition",
    "describe",
    "digits_cnn",
    "digits_mlp",
    "mlp",
    "names",
    "register",
    "restore",
    "sequential",
    "signature",
    "tutorial_mlp",
]


def __getattr__(name: str) -> Any:
    """What torch is needed for: not before it is asked for."""
    if name in __all__:
        from flserving.models import architectures, onnx  # noqa: F401  the latter registers itself

        return getattr(architectures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def blueprint(engine: EngineName, architecture: str, parameters: Parameters) -> "Blueprint":
    """How ``engine`` builds an architecture.

    Raises:
        NotFoundError: The architecture is not registered.
        InvalidModelError: The parameters do not fit it.
        NotSupportedError: The engine cannot run it; the message says which it can.
    """
    if engine == "numpy":
        return plain.Blueprint(architecture, parameters)
    from flserving.models import modules

    return modules.Blueprint(architecture, parameters)
