"""Nodes of graphs that ONNX Runtime leaves to the processor, where another device was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tandemrt.runtime.backends.modules import imported
from tandemrt.runtime.backends.onnxruntime import session_options
from tandemrt.runtime.backends.providers import CPU, opened
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.targets import Target, parse_target

from .memory import in_fresh_process

_RECORD = ("session.record_ep_graph_assignment_info", "1")
_PAINT = ("text_encoder", "denoiser", "vae_decoder")
_KINDS_TOLD = 5
# By operator how many of a graph's nodes are on the processor, and how many nodes it has.
Left = tuple[Counter[str], int]


def left_nodes(model: Path, target: Target) -> Left | None:
    """What of a graph is left to the processor; None where this ONNX Runtime, one before 1.24, does not tell.

    Raises:
        TargetError: the provider was not granted.
        Exception: what ONNX Runtime raises of a model that it cannot load.
    """
    ort = imported("onnxruntime")
    options = session_options(ort, None)
    options.add_session_config_entry(*_RECORD)
    session = opened(ort, model, options, target)
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    parts = session.get_provider_graph_assignment_info()
    nodes = [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
    return Counter(kind for provider, kind in nodes if provider == CPU), len(nodes)


def left_told(bundle: Bundle, target: str) -> Iterator[str]:
    """A sentence for each model of a bundle of which something is left to the processor on a target of another device.

    The models are loaded for it, one after the other, in processes of their own. TensorRT's providers would build their
    engines for that: of these it is not told which nodes.
    """
    parsed = parse_target(target)
    if parsed.backend != "onnxruntime" or parsed.device == "cpu":
        return
    if parsed.device != "cuda":
        yield f"On {target} nodes that its provider does not take run elsewhere, and it is not told which."
        return
    for name, component in bundle.manifest.components.items():
        if component.role in _PAINT:
            yield from sentence(name, target, _found(bundle.model_path(name), parsed.of_component(component)))


def sentence(name: str, target: str, found: Left | None) -> Iterator[str]:
    """What is told of a model; nothing where none of its nodes is left."""
    if found is None:
        yield f"On {target} it is not told which nodes of {name} run on the processor."
    elif found[0]:
        left, total = found
        kinds = ", ".join(f"{kind} {count}" for kind, count in left.most_common(_KINDS_TOLD))
        others = " and others" if len(left) > _KINDS_TOLD else ""
        yield f"On {target} {left.total()} of the {total} nodes of {name} run on the processor: {kinds}{others}."


def _found(model: Path, target: Target) -> Left | None:
    try:
        return in_fresh_process(left_nodes, model, target)
    except Exception:  # whoever runs it says what is wrong
        return None
