"""ONNX graphs in the place of a model's weights, as optimum leaves them: found, and kept inside their folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from ..runtime.errors import BundleError, CheckpointError
from ..runtime.onnx_files import external_files

if TYPE_CHECKING:
    import torch
    from onnxscript import ir

GRAPH_NAME = "model.onnx"
_AGAIN = "Export it again."


@dataclass(frozen=True)
class ForeignGraph:
    """A graph and the files of its external data, as `Weights` of which only the shapes are told."""

    path: Path
    data: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.path, *self.data

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the floating-point initializers, by name."""
        values = self.read().graph.initializers.values()
        tensors = [value.const_value for value in values if value.const_value is not None]
        return {str(tensor.name): tuple(tensor.shape.numpy()) for tensor in tensors if tensor.dtype.is_floating_point()}

    def load(self, name: str) -> torch.Tensor:
        """Refuse: an exporter may have folded, renamed and transposed what a checkpoint calls by this name.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            str(self.path),
            "an ONNX graph, whose weights cannot be taken out",
            got=name,
            expected="safetensors",
            remedy="Give the checkpoint that it was exported from.",
        )

    def read(self) -> ir.Model:
        """The graph, made anew at each call; values that are in other files stay there until they are looked at.

        Raises:
            CheckpointError: not an ONNX graph.
        """
        from onnxscript import ir  # noqa: PLC0415 — whoever only asks what is there waits for no parser

        try:
            return ir.load(self.path)
        except Exception as error:  # protobuf's own error, and whatever a malformed graph provokes
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise CheckpointError(str(self.path), f"not an ONNX graph ({first})", remedy=_AGAIN) from error


def find_graph(folder: Path) -> ForeignGraph | None:
    """The graph in a model's folder, if there is one; all of its files are proved to lie there.

    Raises:
        CheckpointError: it is malformed, or names a file that is elsewhere or missing.
    """
    path = folder / GRAPH_NAME
    if not path.is_file():
        return None
    try:
        names = sorted(external_files(path))
    except BundleError as error:
        raise CheckpointError(str(path), f"not an ONNX graph ({error.what})", remedy=_AGAIN) from error
    for name in (GRAPH_NAME, *names):
        _require_inside(path, name)
    return ForeignGraph(path, tuple(folder / name for name in names))


def is_foreign(weights: object) -> bool:
    """Whether a part's weights are a graph."""
    return isinstance(weights, ForeignGraph)


def _require_inside(graph: Path, name: str) -> None:
    """Check that a name stands for a regular file beside the graph, not for one that a path or a link leads to."""
    try:
        is_there = Path(name).name == name and S_ISREG(graph.with_name(name).lstat().st_mode)
    except (OSError, ValueError):  # absent, or a name that no file can have
        is_there = False
    if not is_there:
        raise CheckpointError(
            str(graph),
            "file that it is made of",
            got=name[:256],
            expected="a regular file in the same folder",
            remedy="Copy an export of your own with `cp -rL`; do not use this one unless you trust its origin.",
        )
