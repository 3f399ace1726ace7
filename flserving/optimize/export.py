"""A module as an ONNX graph, and graphs with weights of few bits: PyTorch's exporter and ONNX
Runtime's tools, tamed.

Their packages are imported inside the functions.
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flserving.errors import InvalidModelError
from flserving.extras import need
from flserving.models import Shape
from flserving.models.onnx import OnnxModel

# largest difference of an export from torch, as a share of the largest output (at least of 1)
TOLERANCE = 1e-5
_NOISY = (
    "torch.onnx._internal.exporter._registration",
    "onnxruntime.quantization.matmul_nbits_quantizer",
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporter and quantisers log about what is not installed, warn of torch's own code, and set up
    the root logger."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    level = root.level
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def sealed(graph: Any, inputs: Shape, outputs: int) -> OnnxModel:
    """The graph without what tools noted in it (paths of this machine among it), ready to run: same
    weights, same bytes. Raises InvalidModelError: see :func:`flserving.models.onnx.check`."""
    inside = graph.graph
    for it in (graph, inside, *inside.node, *inside.input, *inside.output, *inside.initializer):
        it.ClearField("metadata_props")
        it.ClearField("doc_string")
    for field in ("value_info", "quantization_annotation"):
        inside.ClearField(field)
    return OnnxModel.of(graph.SerializeToString(deterministic=True), inputs, outputs)


def graph_of(module: nn.Module, inputs: Shape, outputs: int) -> Any:
    """An ``onnx.ModelProto`` that answers as the module does: its own, or an export that was
    compared with torch.

    Raises:
        InvalidModelError: It cannot be exported, or the export answers otherwise than the module by
            over ``TOLERANCE``.
    """
    onnx = need("onnx", "onnx")
    if isinstance(module, OnnxModel):
        return onnx.ModelProto.FromString(bytes(module.graph.numpy()))
    need("onnxscript", "onnx")
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(16, *inputs, generator=source)
    kind = type(module).__name__
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                (rows,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("rows")},),
                input_names=["rows"],
                output_names=["outputs"],
                verbose=False,
            )
        assert program is not None
        graph = program.model_proto
    except Exception as error:  # torch.export and the exporter raise what they meet
        reason = str(error).strip().split("\n")[0][:300]
        raise InvalidModelError(f"the {kind} cannot be exported: {reason}") from error
    exported = sealed(graph, inputs, outputs)
    with torch.inference_mode():
        wanted = module(rows)
        errors = torch.cat([exported(rows) - wanted, exported(rows[:1]) - wanted[:1]])
    worst = errors.abs().max().item()
    largest = wanted.abs().max().item()
    if not worst <= TOLERANCE * max(1.0, largest):
        raise InvalidModelError(
            f"the export of the {kind} answers otherwise, by {worst:.1e}: keep it on torch"
        )
    return graph


def block_quantised(graph: Any, bits: int) -> Any:
    """Weights of linear layers in 8 or 4 bits with a scale for every 32; with 8, activations
    likewise in each row.

    Raises:
        InvalidModelError: There is no such layer.
    """
    with _quiet():
        wrapped = need("onnxruntime.quantization.onnx_model", "onnx").ONNXModel(graph)
        wrapped.replace_gemm_with_matmul()
        tool = need("onnxruntime.quantization.matmul_nbits_quantizer", "onnx")
        settings = tool.DefaultWeightOnlyQuantConfig(
            block_size=32, is_symmetric=True, bits=bits, accuracy_level=4 if bits == 8 else 1
        )  # 4: activations as int8; 1: as float32
        work = tool.MatMulNBitsQuantizer(wrapped.model, algo_config=settings)
        before = _products(work.model.model)
        work.process()
    if _products(work.model.model) <= before:
        raise InvalidModelError(
            "no linear layer with float32 weights: there is nothing to quantise in this version"
        )
    return work.model.model


def _products(graph: Any) -> int:
    return sum(node.op_type == "MatMulNBits" for node in graph.graph.node)


def calibrated(graph: Any, rows: Tensor) -> Any:
    """int8 weights and activations, the latter scaled by what standardised ``rows`` show.

    Raises:
        InvalidModelError: It is quantised already.
    """
    onnx = need("onnx", "onnx")
    tool = need("onnxruntime.quantization", "onnx")
    if any(node.op_type in ("QuantizeLinear", "MatMulNBits") for node in graph.graph.node):
        raise InvalidModelError("the version is quantised already: quantise its parent")
    name = graph.graph.input[0].name
    batches = iter([{name: part.numpy()} for part in torch.split(rows, 256)])
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        before = f"{folder}/before.onnx"
        ready = f"{folder}/ready.onnx"
        after = f"{folder}/after.onnx"
        onnx.save(graph, before)
        shapes = need("onnxruntime.quantization.shape_inference", "onnx")
        shapes.quant_pre_process(before, ready, skip_symbolic_shape=True)
        onnx.save(_unshared(onnx.load(ready)), ready)
        reader = SimpleNamespace(get_next=lambda: next(batches, None))
        tool.quantize_static(ready, after, reader, per_channel=True)
        return onnx.load(after)


def _unshared(graph: Any) -> Any:
    """The graph with a copy of each constant for each node that reads it. (Exporters keep equal
    ones once: the scales of two norms, say. ONNX Runtime, where it keeps products exact, rewrites
    int8 constants node by node, and refuses the graph at the second that reads the same one.)"""
    constants = {constant.name: constant for constant in graph.graph.initializer}
    read = set[str]()
    for node in graph.graph.node:
        for place, name in enumerate(node.input):
            if name in constants and name in read:
                copy = graph.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = f"{name}.{len(graph.graph.initializer)}"
                node.input[place] = copy.name
            read.add(name)
    return graph
