"""The second backend: ONNX Runtime, behind the same engine.

A version runs on it when its manifest names the architecture ``onnx``. Its one tensor is the graph,
uint8 [nbytes], in the same weights file as any other tensor. So all that holds for weights holds
for graphs: digests, deltas, signed releases, caches, servers and devices take them as they are, and
no second file has to be kept in step.

A graph is code, so what may run is listed: no file beside it, no loop, no function, sizes that are
known beforehand and proportional to the rows. Left out of the list are operators that draw random
numbers, and those that quantise a batch by what is in it: there, a row's answer would depend on
whose rows are beside it. Normalisations are listed where they take their statistics from a row
alone (InstanceNormalization is what exporters make of GroupNorm). A graph can still put listed
operators together so that rows meet: ``probing.check_rows`` looks for that at every publish and
load.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flserving.errors import InvalidModelError
from flserving.extras import need
from flserving.models.architectures import register
from flserving.models.plain import JSON, Shape
from flserving.models.probing import QUANTISED_TOLERANCE
from flserving.models.weights import as_bytes

_MOST_NODES = 10_000  # of a graph
_MOST_VALUES = 1 << 26  # of one tensor inside it that is no weight, for one row
_OPERATORS = (
    "Abs Add AveragePool BatchNormalization Cast Clip Concat Conv DequantizeLinear Div Elu Erf Exp Flatten Gather Gelu "
    "Gemm GlobalAveragePool GlobalMaxPool GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization "
    "LayerNormalization LeakyRelu LogSoftmax MatMul MatMulNBits Max MaxPool Min Mish Mul Neg PRelu Pad Pow "
    "QuantizeLinear RMSNormalization Reciprocal ReduceMax ReduceMean ReduceSum Relu Reshape Selu Shape Sigmoid Slice "
    "Softmax Softplus Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze"
)
_FLOATS = {1, 10, 11}  # data types: float32, float16, float64
# types of attributes: numbers, text and lists of them; no tensors, no graphs
_PLAIN = {1, 2, 3, 6, 7, 8}


def check(graph: bytes, inputs: Shape, outputs: int) -> None:
    """Refuse what is not a harmless graph from float32 [N, *inputs] to float32 [N, outputs],
    without running it.

    Raises:
        InvalidModelError: Not ONNX, an operator that is not listed, weights in another file, or a
            tensor that is too large or not proportional to the rows.
        NotSupportedError: onnx is not installed.

    Cost: two shape inferences, about 1 ms, and two copies of the graph.
    """
    onnx = need("onnx", "onnx")
    try:
        model = onnx.ModelProto.FromString(graph)
        odd = _oddity(onnx, model)
        if odd is None:
            onnx.checker.check_model(model)
            one = _shapes(onnx, model, 1)
            two = _shapes(onnx, model, 2)
    except Exception as error:  # protobuf's, the checker's and the inference's have no common root
        raise InvalidModelError(f"not a sound ONNX graph: {str(error)[:300]}") from None
    if odd is not None:
        raise InvalidModelError(f"the ONNX graph {odd}: export it from a module of plain layers")
    for name in [output for node in model.graph.node for output in node.output if output]:
        small = one.get(name, 0)
        large = two.get(name, 0)
        if not 0 < small <= _MOST_VALUES or large not in (small, 2 * small):
            raise InvalidModelError(
                f"{name!r} in the ONNX graph has {small:,} values for one row and {large:,} for two (0: unknown): the "
                f"most is {_MOST_VALUES:,}, in proportion to the rows"
            )
    found = [_ends(model.graph.input), _ends(model.graph.output)]
    if found != [[(1, list(inputs))], [(1, [outputs])]]:  # 1: float32
        wanted = ", ".join(map(str, ("N", *inputs)))
        raise InvalidModelError(
            f"the ONNX graph maps {found}: it must map float32 [{wanted}] to [N, {outputs}]"
        )


def _ends(values: Any) -> list[tuple[int, list[int]]]:
    """Of a graph's inputs, or outputs, the data type and the shape of a row."""
    found = []
    for value in values:
        kind = value.type.tensor_type
        shape = [axis.dim_value for axis in kind.shape.dim]
        found.append((kind.elem_type, shape[1:]))
    return found


def _oddity(onnx: Any, model: Any) -> str | None:
    graph = model.graph
    if (
        model.functions
        or model.training_info
        or graph.sparse_initializer
        or len(graph.node) > _MOST_NODES
    ):
        return "has functions, training steps, sparse weights or too many nodes"
    if any(onnx.external_data_helper.uses_external_data(tensor) for tensor in graph.initializer):
        return "keeps weights in another file"
    for tensor in graph.initializer:
        if (
            tensor.data_type in _FLOATS
            and not np.isfinite(onnx.numpy_helper.to_array(tensor)).all()
        ):
            return f"has weights {tensor.name!r} that are not finite"
    for node in graph.node:
        microsoft = node.op_type == "MatMulNBits"
        if node.op_type not in _OPERATORS.split() or (node.domain == "com.microsoft") != microsoft:
            return f"has the operator {node.domain + ' ' + node.op_type!r}, which is not listed"
        if any(attribute.type not in _PLAIN for attribute in node.attribute):
            return f"has a {node.op_type} with a tensor or a graph as attribute"
    return None


def _shapes(onnx: Any, model: Any, rows: int) -> dict[str, int]:
    """Number of values of every tensor in the graph for so many rows, by name; what is unknown
    counts 0."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    graph = probe.graph
    helper = onnx.helper
    del graph.value_info[:]
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = rows
    for it in graph.output:
        it.type.tensor_type.shape.dim[0].dim_value = rows
    for number, node in enumerate(graph.node):
        # ONNX does not know it: a product with float32 [K, N], it says itself
        if node.op_type == "MatMulNBits":
            size = {it.name: it.i for it in node.attribute}
            weight = helper.make_tensor_value_info(
                f"{node.name} {number}", 1, [size["K"], size["N"]]
            )
            graph.input.append(weight)
            node.CopyFrom(
                helper.make_node("MatMul", [node.input[0], weight.name], node.output, node.name)
            )
    known = onnx.shape_inference.infer_shapes(
        probe, check_type=True, strict_mode=True, data_prop=True
    ).graph
    counts = {}
    for value in (*known.value_info, *known.output):
        shape = value.type.tensor_type.shape
        counts[value.name] = math.prod(axis.dim_value for axis in shape.dim)
    return counts


def _shape(inputs: int | Sequence[int]) -> Shape:
    if isinstance(inputs, int):
        return (inputs,)
    return tuple(inputs)


@register(
    "onnx",
    input_shape=lambda inputs, outputs, nbytes: _shape(inputs),
    output_shape=lambda inputs, outputs, nbytes: (outputs,),
)
class OnnxModel(nn.Module):
    """float32 [N, *inputs] -> float32 [N, outputs] by ONNX Runtime, on as many threads as torch has
    when it is loaded.

    ``graph`` is the ONNX file's bytes. Loading them checks them and makes the session; a graph that
    is refused fails the load like any weights that do not fit. Raises NotSupportedError: onnx or
    onnxruntime is not installed.
    """

    graph: Tensor

    def __init__(self, inputs: int | Sequence[int], outputs: int, nbytes: int) -> None:
        super().__init__()
        # who cannot run it learns that before it downloads anything
        for package in ("onnx", "onnxruntime"):
            need(package, "onnx")
        self.inputs = _shape(inputs)
        self.outputs = outputs
        self.register_buffer("graph", torch.zeros(nbytes, dtype=torch.uint8))
        self._session: Any = None

    @classmethod
    def of(cls, graph: bytes, inputs: int | Sequence[int], outputs: int) -> "OnnxModel":
        """A loaded model. Raises as :func:`check`."""
        model = cls(inputs, outputs, len(graph))
        model.graph = torch.frombuffer(bytearray(graph), dtype=torch.uint8)
        model._session = model._open()
        return model

    @property
    def nbytes(self) -> int:
        """Bytes held: the graph, and the session's copy of its weights."""
        return 2 * self.graph.nbytes

    @property
    def parameters_of(self) -> dict[str, JSON]:
        """What builds it again, for a manifest."""
        inputs: JSON = list(self.inputs)
        if len(self.inputs) == 1:
            inputs = self.inputs[0]
        return {"inputs": inputs, "outputs": self.outputs, "nbytes": self.graph.nbytes}

    def forward(self, rows: Tensor) -> Tensor:
        if self._session is None:  # a copy of a loaded model
            self._session = self._open()
        (answer,) = self._session.run(None, {self._input: rows.detach().numpy()})
        return torch.from_numpy(answer)

    def _open(self) -> Any:
        data = bytes(as_bytes(self.graph))
        check(data, self.inputs, self.outputs)
        runtime = need("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        # the cores are the server's
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without VNNI an int8 product adds pairs in 16 bits and saturates: other answers than the
        # graph defines, and than the same graph gives on a newer processor. This takes the exact,
        # slower way there, and only there.
        options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            session = runtime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # as many classes as ONNX Runtime has status codes
            raise InvalidModelError(f"ONNX Runtime refuses the graph: {str(error)[:300]}") from None
        self._input = session.get_inputs()[0].name
        if any(node in data for node in (b"QuantizeLinear", b"MatMulNBits")):
            self.rounds_by = QUANTISED_TOLERANCE
        return session

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        errors: list[str] = arguments[-1]
        if not errors:
            try:
                self._session = self._open()
            except InvalidModelError as error:
                errors.append(str(error))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}  # a session cannot be copied
