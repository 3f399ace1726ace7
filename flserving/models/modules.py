"""What torch runs: any registered architecture as a module, and a module as the steps of its
forward."""

import copy
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flserving.errors import InvalidModelError
from flserving.models import architectures, onnx, probing, weights
from flserving.models.architectures import SplitModel, as_split
from flserving.models.plain import Parameters, Shape, Steps
from flserving.models.processing import Floats, Postprocessor
from flserving.models.weights import Array, Tensors


class Blueprint:
    """An architecture with its parameters, as torch builds it.

    Attributes:
        shapes: Of one row in and out.
        code: What stands for the code that runs, see :func:`architectures.definition`.
        probed: Whether nothing has to look if rows see each other.

    Raises:
        NotFoundError: It is not registered.
        InvalidModelError: The parameters do not fit it.
    """

    probed = False

    def __init__(self, architecture: str, parameters: Parameters) -> None:
        self._named = architecture, parameters
        self.shapes = architectures.signature(architecture, parameters)
        self.code = architectures.definition(architecture)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The module without memory."""
        with torch.device("meta"):
            return architectures.build(*self._named)

    @property
    def like(self) -> dict[str, Array]:
        """Names, shapes and dtypes of its tensors, in arrays that take no memory."""
        return {
            name: np.broadcast_to(
                weights.as_array(torch.zeros((), dtype=it.dtype, device="cpu")), it.shape
            )
            for name, it in self.skeleton.state_dict().items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes that the model will hold: shared tensors once, a graph as its runtime keeps it."""
        return architectures.nbytes(*self._named)

    def head(self) -> tuple[int, int]:
        """Widths of the head that a client may own. Raises InvalidModelError: There is none."""
        generic = as_split(self.skeleton).head
        return generic.in_features, generic.out_features

    def restore(self, tensors: Tensors) -> nn.Module:
        """The model that holds these very tensors. Raises RuntimeError: They do not fit."""
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        return architectures.restore(*self._named, weights.as_tensors(tensors), nbytes=nbytes)

    def check(self, tensors: Tensors, postprocessor: Postprocessor | None) -> None:
        """Raise InvalidModelError or ModelExecutionError where a model of these tensors may not
        serve: see ``probing``. With a ``postprocessor``, the answer to a row of zeros must be one.
        A forward may change a buffer: give copies.
        """
        skeleton = self.skeleton
        if isinstance(skeleton, onnx.OnnxModel):
            onnx.check(bytes(weights.as_bytes(tensors["graph"])), skeleton.inputs, skeleton.outputs)
        model = self.restore(tensors).eval().requires_grad_(False)
        probing.check_answer(model, *self.shapes, postprocessor)
        probing.check_rows(model, self.shapes[0], probing.tolerance_of(model))


class Runner:
    """A module as an engine runs it, in evaluation mode; a copy of it, unless ``owned``.

    What runs are ``steps``, or ``body`` and then ``head``, on ``tensor(rows)``, within ``scope()``.

    Raises:
        InvalidModelError: Not a module, or one that cannot be copied.
    """

    scope = torch.inference_mode
    tensor = staticmethod(torch.from_numpy)

    def __init__(self, model: nn.Module, owned: bool) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidModelError(f"model is a {type(model).__name__}: pass a torch.nn.Module")
        self.model = model.eval().requires_grad_(False) if owned else copy_of(model)
        self.steps = lean(self.model)

    @property
    def body(self) -> Steps:
        return lean(as_split(self.model).body)

    @property
    def head(self) -> Steps:
        return lean(as_split(self.model).head)

    @staticmethod
    def empty(shape: Shape) -> Floats:
        """Memory for heads."""
        # aligned: a product of aligned rows is the same in any batch
        memory: Floats = torch.empty(shape).numpy()
        return memory

    @staticmethod
    def apply_heads(inputs: Tensor, heads: Floats, generic: Tensor | None) -> Tensor:
        """Row by row, inputs [N, F] times heads [N, F + 1, C], whose last rows are biases; added to
        ``generic``."""
        matrices = torch.from_numpy(heads)
        ones = inputs.new_ones(len(inputs), 1)
        # one product with the bias inside: an eighth less than two
        rows = torch.cat([inputs, ones], dim=1)[:, None]
        if generic is None:
            return torch.bmm(rows, matrices)[:, 0]
        return torch.baddbmm(generic[:, None], rows, matrices)[:, 0]


def copy_of(module: nn.Module, tensors: dict[int, Tensor] | None = None) -> nn.Module:
    """A deep copy in evaluation mode, without gradients; ``tensors`` says by ``id`` what to put in
    place of which.

    Raises:
        InvalidModelError: It cannot be copied.
    """
    memo: dict[int, Any] = dict(tensors or {})
    for part in module.modules():
        for value in vars(part).values():
            # pruning and weight_norm: torch does not copy these
            if torch.is_tensor(value) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(module, memo).eval().requires_grad_(False)
    except Exception as error:
        raise InvalidModelError(
            f"cannot copy the {type(module).__name__}: {type(error).__name__}: {error}"
        ) from error


def lean(module: nn.Module) -> Steps:
    """The steps of ``module``'s forward: a chain of linear layers and ReLUs as plain calls,
    anything else as one call.

    For small models the Python around the arithmetic is the cost; unrolling the tutorial's model
    takes its forward from 15 to 8 us. Only exact types without hooks are unrolled, so the numbers
    are the module's own, bit for bit.
    """
    # changed on this very object
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return [(module, ())]
    if type(module) is nn.Sequential:
        # not children(): it names a shared layer once
        return [step for child in module for step in lean(child)]
    if type(module) is SplitModel:
        return lean(module.body) + lean(module.head)
    if type(module) is nn.Linear:
        return [(nn.functional.linear, (module.weight, module.bias))]
    if type(module) is nn.ReLU:
        return [(torch.relu, ())]
    return [(module, ())]
