"""Graphs as OpenVINO is to compile them: the angles of sinusoidal embeddings stay in fp32 whatever the rest is in.

For a CPU they are also rewritten to be faster, see `openvino_rewrites`.

Told to compute in bf16, OpenVINO rounds time steps, and their products with the frequencies, to eight bits: 999 becomes
1000, and a sine's argument is off by up to two radians. `docs/engines.md` has what that does to a denoiser.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .modules import imported
from .openvino_rewrites import rewrite

_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze"})
_ANGLE = _VIEWS | {"Add", "Constant", "Convert", "Divide", "Multiply", "Parameter", "Subtract"}
# OpenVINO's plugins leave nodes with this attribute as they are. Python can set it in a model's file alone.
_KEEP = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}


def read_graph(core: Any, path: Path, hint: str, device: str = "cpu") -> Any:
    """OpenVINO's model of an ONNX file, to be compiled for a device with this `INFERENCE_PRECISION_HINT`."""
    graph = core.read_model(path)
    if device == "cpu":
        rewrite(graph)
    if hint != "f32":
        _keep_angles(core, graph)
    return graph


def _keep_angles(core: Any, graph: Any) -> None:
    sines = [node.input(0) for node in graph.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos")]
    sines = [sine for sine in sines if all(node.get_type_name() in _ANGLE for node in _before(sine))]
    if not sines:
        return
    for sine in sines:
        # Views themselves go away here, and with them their inputs.
        stays = [node for node in _before(sine) if node.get_type_name() not in _VIEWS]
        for port in [sine, *(port for node in stays for port in node.inputs())]:
            _reshape_once(port)
    nodes = [node for sine in sines for node in _before(sine)]
    parameters = {node.get_friendly_name(): node for node in nodes if node.get_type_name() == "Parameter"}
    angles = imported("openvino").Model(
        [sine.get_source_output() for sine in sines], list(parameters.values()), "angles"
    )
    kept = _kept(core, angles)
    for parameter in kept.get_parameters():
        for port in parameter.output(0).get_target_inputs():
            port.replace_source_output(parameters[parameter.get_friendly_name()].output(0))
    for sine, result in zip(sines, kept.get_results(), strict=True):
        sine.replace_source_output(result.input(0).get_source_output())
    graph.validate_nodes_and_infer_types()


def _before(port: Any) -> Iterator[Any]:
    """The nodes that an input is computed from, each once, as far as they are none but those of an angle."""
    waiting, seen = [port.get_source_output().get_node()], set[str]()
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            yield node
            if node.get_type_name() in _ANGLE:
                waiting += [further.get_source_output().get_node() for further in node.inputs()]


def _reshape_once(port: Any) -> None:
    """Let one Reshape stand for a row of views: OpenVINO would replace or join these, and forget the attribute."""
    source = port.get_source_output()
    viewed = source
    while viewed.get_node().get_type_name() in _VIEWS:
        viewed = viewed.get_node().input(0).get_source_output()
    shape = [-1 if size.is_dynamic else size.get_length() for size in source.get_partial_shape()]
    if viewed != source and shape.count(-1) <= 1:
        reshaped = imported("openvino").opset13.reshape(viewed, shape, special_zero=False)
        port.replace_source_output(reshaped.output(0))


def _kept(core: Any, model: Any) -> Any:
    """The model with every node kept in its precision."""
    with tempfile.TemporaryDirectory() as folder:
        xml, weights = Path(folder, "model.xml"), Path(folder, "model.bin")
        imported("openvino").serialize(model, xml, weights)
        tree = ElementTree.parse(xml)
        for layer in tree.iter("layer"):
            if layer.get("type") not in ("Parameter", "Const", "Result"):
                stated = layer.find("rt_info")
                ElementTree.SubElement(
                    ElementTree.SubElement(layer, "rt_info") if stated is None else stated, "attribute", _KEEP
                )
        tree.write(xml)
        return core.read_model(xml, weights, {"ENABLE_MMAP": False})
