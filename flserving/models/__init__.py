"""What may be served: architectures, weights, what happens to numbers before and after the model, and the checks.

``architectures.py`` is the allow-list that a manifest names; read it first. ``weights.py`` turns a state dict into
bytes and back. ``processing.py`` holds the preprocessor and the postprocessor: here and not in ``serving``, because a
version is published with them, and the registry refuses statistics that do not fit and a model that no server could
answer with. ``probing.py`` asks whether each row is answered by itself. For notebook 09: ``onnx.py``. For commands that
register architectures of your own: ``own_code.py``.
"""

from flserving.models.architectures import (
    JSON,
    Architecture,
    Shape,
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

__all__ = [
    "JSON",
    "Architecture",
    "Shape",
    "SplitModel",
    "as_split",
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
