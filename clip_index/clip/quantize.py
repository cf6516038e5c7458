"""int8 for ONNX graphs of towers: matrices with a scale for each column, activations with a calibrated one.

The steps: channels that stand out are evened out between a norm and the matrix after it (SmoothQuant, Xiao et al. 2022,
https://arxiv.org/abs/2211.10438) -> the graph runs on calibration inputs and tells the range of what each matrix is
multiplied with -> the graph is rewritten with QuantizeLinear and DequantizeLinear, which every runtime knows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from clip_index.clip.model import ResidualAttentionBlock

if TYPE_CHECKING:
    from onnx import ModelProto

_LEAST_SIGNAL = 6.0
"""An activation whose mean magnitude is less than this many times its rounding error stays float32."""


@torch.no_grad()
def smooth(tower: nn.Module, run: Callable[[], object]) -> None:
    """Scale the channels between norms and matrices so that both spread evenly, in place; the function stays the same.

    `run` puts the calibration inputs through the tower.
    """
    most: dict[nn.Module, Tensor] = {}

    def watch(norm: nn.Module, _: object, y: Tensor) -> None:
        largest = y.abs().flatten(0, -2).amax(dim=0)
        most[norm] = torch.maximum(most[norm], largest) if norm in most else largest

    blocks = [part for part in tower.modules() if isinstance(part, ResidualAttentionBlock)]
    hooks = [norm.register_forward_hook(watch) for block in blocks for norm in (block.ln_1, block.ln_2)]
    run()
    for hook in hooks:
        hook.remove()
    for block in blocks:
        for norm, weight in ((block.ln_1, block.attn.in_proj_weight), (block.ln_2, block.mlp.c_fc.weight)):
            even_out(norm, weight, most[norm])


def even_out(norm: nn.LayerNorm, weight: Tensor, most: Tensor) -> Tensor:
    """What the channels [k] of a norm, of the largest magnitudes `most`, are divided by, and the matrix multiplied."""
    scale = (most.clamp(min=1e-5) / weight.abs().amax(dim=0).clamp(min=1e-5)).sqrt()
    norm.weight.div_(scale)
    norm.bias.div_(scale)
    weight.mul_(scale)
    return scale


def quantize(path: str, inputs: Sequence[np.ndarray]) -> tuple[ModelProto, int, int]:
    """The float32 graph of a file in int8, calibrated on some inputs: (graph, matrices in int8, matrices in all).

    The last matrix, the projection, stays as it is, and so do those whose input has outliers.
    """
    import onnx
    from onnx import helper, numpy_helper
    from onnx.external_data_helper import load_external_data_for_model

    folder = os.path.dirname(path)
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    matrices = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    products = [at for at, node in enumerate(graph.node) if node.op_type == "MatMul" and node.input[1] in matrices]
    ranges = _ranges(model, folder, sorted({graph.node[at].input[0] for at in products}), inputs)
    chosen = {at for at in products[:-1] if fits(*ranges[graph.node[at].input[0]])}
    nodes, constants, rounded = [], {}, set()
    for at, node in enumerate(graph.node):
        if at in chosen:
            x, matrix = node.input
            for name in {x, matrix} - rounded:
                if name == x:
                    made = _activation(x, *ranges[x][:2])
                    nodes.append(helper.make_node("QuantizeLinear", [x, *made], [f"{x}.uint8"]))
                    nodes.append(helper.make_node("DequantizeLinear", [f"{x}.uint8", *made], [f"{x}.float"]))
                else:
                    made = _columns(matrix, numpy_helper.to_array(matrices[matrix], folder))
                    nodes.append(helper.make_node("DequantizeLinear", [*made], [f"{matrix}.float"], axis=1))
                constants |= made
            rounded |= {x, matrix}
            node.input[:] = [f"{x}.float", f"{matrix}.float"]
        nodes.append(node)
    _replace(graph.node, nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    kept += [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    _replace(graph.initializer, kept)
    load_external_data_for_model(model, folder)
    return model, len(chosen), len(products)


def _ranges(
    model: ModelProto, folder: str, names: Sequence[str], inputs: Sequence[np.ndarray]
) -> dict[str, tuple[float, float, float]]:
    """(least, largest, mean magnitude) of some values of a graph, over all inputs, zero being within the range."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    outputs = []
    for name in names:
        for operator, kwargs, kind in (
            ("ReduceMin", {"keepdims": 0}, TensorProto.FLOAT),
            ("ReduceMax", {"keepdims": 0}, TensorProto.FLOAT),
            ("ReduceL1", {"keepdims": 0}, TensorProto.FLOAT),
            ("Size", {}, TensorProto.INT64),
        ):
            outputs.append(f"{name}_{operator}")
            watched.graph.node.append(helper.make_node(operator, [name], outputs[-1:], **kwargs))
            watched.graph.output.append(helper.make_tensor_value_info(outputs[-1], kind, []))
    # beside the weights, which the graph names relative to itself
    onnx.save(watched, path := os.path.join(folder, "watched.onnx"))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = session.get_inputs()[0].name
    told = np.array([session.run(outputs, {feed: block}) for block in inputs], np.float64).reshape(-1, len(names), 4)
    os.remove(path)
    least, largest = told[..., 0].min(axis=0).clip(max=0), told[..., 1].max(axis=0).clip(min=0)
    magnitude = told[..., 2].sum(axis=0) / told[..., 3].sum(axis=0)
    return dict(zip(names, zip(least.tolist(), largest.tolist(), magnitude.tolist(), strict=True), strict=True))


def fits(least: float, largest: float, magnitude: float) -> bool:
    """Whether 255 steps from the least to the largest value are fine enough for values of a mean magnitude."""
    # steps of equal width have a rounding error of their width / sqrt(12)
    return magnitude * 12**0.5 >= _LEAST_SIGNAL * (largest - least) / 255 > 0


def _activation(name: str, least: float, largest: float) -> dict[str, np.generic]:
    step = (largest - least) / 255
    return {f"{name}.scale": np.float32(step), f"{name}.zero": np.uint8(round(-least / step))}


def _columns(name: str, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """A matrix [k, n] in int8, with the scale and the zero of each column."""
    step = np.maximum(np.abs(matrix).max(axis=0), 1e-12) / 127
    return {
        f"{name}.int8": np.rint(matrix / step).astype(np.int8),
        f"{name}.scale": step.astype(np.float32),
        f"{name}.zero": np.zeros(len(step), np.int8),
    }


def _replace(field, values) -> None:
    del field[:]
    field.extend(values)
