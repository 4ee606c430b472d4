"""ONNX graphs from torch modules, through torch's dynamo exporter."""

from __future__ import annotations

import ast
import contextlib
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from onnxscript import ir

from ..runtime.errors import ExportError, TandemError
from ..runtime.manifest import TensorSpec
from .lazy import unread
from .modules import Graph, extent
from .onnx_weights import bind_weights
from .simplify import simplify
from .weights import first_line

OPSET = 20
# Protobuf messages end at 2 GiB, and one that is read or written is twice in memory; external data is mapped.
EXTERNAL_DATA_ABOVE = 512_000_000
MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx_data"

# Sizes to trace with, none of them 1, and equal only where they are: equal sizes or a 1 could be taken for a fixed
# relation.
_EXAMPLE = {"batch": 3, "steps": 3, "sequence": 5, "height": 4, "width": 6}
_DTYPES = {"float32": torch.float32, "int64": torch.int64}


def onnx_from_module(name: str, graph: Graph) -> ir.Model:
    """Export a module with every string in its inputs' shapes as a symbolic dimension; its weights are not loaded.

    Nodes are named by the module they come from (`down_blocks.0.resnets.0.conv1/Conv`).

    Raises:
        ExportError: an operator without an ONNX counterpart, or control flow that depends on values.
    """
    examples = tuple(_example(spec, graph.multiple) for spec in graph.inputs)
    dynamic = inspect.signature(graph.module.forward).bind(
        *(
            {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
            for spec in graph.inputs
        )
    )
    try:
        with quiet(), torch.no_grad(), unread(graph.module):
            program = torch.export.export(graph.module, examples, dynamic_shapes=dynamic.arguments, strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in graph.inputs],
                output_names=[spec.name for spec in graph.outputs],
                external_data=False,
                verbose=False,
                optimize=False,
            )
            # First, because simplifying looks at small values and would load large ones to transpose them.
            bind_weights(exported.model, graph.weights)
            simplify(exported.model)
    except (MemoryError, TandemError):
        raise
    except Exception as error:  # the exporter raises whatever its passes meet; all of it becomes one error here
        raise ExportError(
            name,
            f"torch's exporter failed ({type(error).__name__}: {first_line(error)})",
            expected=f"a graph in opset {OPSET}",
        ) from error
    model: ir.Model = exported.model
    _tidy(model, graph)
    return model


def save(model: ir.Model, folder: Path) -> Path:
    """Write `model.onnx` to a folder, the weights beside it in `model.onnx_data` where they are over 512 MB.

    Weights that are in files of a checkpoint are loaded one after another.
    """
    path = folder / MODEL_NAME
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, path, external_data=DATA_NAME if weights > EXTERNAL_DATA_ABOVE else None)
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of torch, diffusers and transformers from the user, who can do nothing about them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _example(spec: TensorSpec, multiple: int) -> torch.Tensor:
    sizes = {name: size * (multiple if name in ("height", "width") else 1) for name, size in _EXAMPLE.items()}
    return torch.ones([extent(size, sizes) for size in spec.shape], dtype=_DTYPES[spec.dtype])


def _tidy(model: ir.Model, graph: Graph) -> None:
    """Give the graph the bundle's names and shapes; drop what only tells of this machine and this run."""
    for value, spec in zip((*model.graph.inputs, *model.graph.outputs), (*graph.inputs, *graph.outputs), strict=True):
        value.shape = ir.Shape(spec.shape)
    seen: Counter[str] = Counter()
    for node in model.graph:
        module = _module_of(node)
        name = f"{module}/{node.op_type}" if module else node.op_type
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = graph.role


def _module_of(node: ir.Node) -> str:
    """The module a node was traced in, from the exporter's list of scopes: wrapper, model, …, layer, operation."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    path = scopes[-2] if len(scopes) > 2 else ""
    return str(path).removeprefix("unet.").removeprefix("text_model.")
