"""How even stages are: the work counted is what torch counts, and at the families' true sizes it splits well."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from tandemrt.engines.blocks import block_of, boundaries, chosen, work_by_block
from tandemrt.engines.formulas import sizes_of
from tandemrt.engines.graph_files import read_graph, spec
from tandemrt.engines.inferred import Inferred, inferred, multiply_adds
from tandemrt.engines.stages import Nominal
from tandemrt.export.presets import models
from tandemrt.export.random_checkpoint import build

from .small_denoisers import FAMILIES, module
from .stale_reference import UNITS, predicted

# GMACs of one forward, attention's products among them, as the presets' sources have them.
PUBLISHED = {"unet-sd1": (401.6, Nominal(64, 64, 77)), "unet-bk-sdm-tiny": (242.8, Nominal(64, 64, 77)),
             "unet-sdxl": (3380.6, Nominal(128, 128, 77)),
             "transformer-sd3-medium": (4452.0, Nominal(128, 128, 333))}  # fmt: skip
# The largest stage's work, of the mean's.
LARGEST = {"unet-bk-sdm-tiny": {2: 1.08, 3: 1.06, 4: 1.12}}
USUAL = {2: 1.06, 3: 1.06, 4: 1.06}


def counted(denoiser: Any, nominal: Nominal) -> dict[str, int]:
    """Multiply-adds by module in the order they run, as torch counts them; that of the whole is called "Global"."""
    config = denoiser.config
    device = next(denoiser.parameters()).device
    latent = torch.zeros(1, config.in_channels, nominal.height, nominal.width, device=device)
    width = config.get("joint_attention_dim") or config.cross_attention_dim
    branch = {"encoder_hidden_states": torch.zeros(1, nominal.sequence, width, device=device)}
    if "joint_attention_dim" in config:
        branch["pooled_projections"] = torch.zeros(1, config.pooled_projection_dim, device=device)
    elif config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        branch |= {"text_embeds": torch.zeros(1, pooled, device=device), "time_ids": torch.zeros(1, 6, device=device)}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predicted(denoiser, latent, torch.zeros((), device=device), branch)
    found = counter.get_flop_counts()
    return {name.partition(".")[2] or name: sum(by_op.values()) // 2 for name, by_op in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graphs_work_is_what_torch_counts(exported: Callable[[str], Path], family: str) -> None:
    nominal = Nominal(16, 8, 7)
    model = read_graph(exported(family))
    inputs = [spec(value, family) for value in model.graph.input]
    sizes = sizes_of(inputs, batch=1, height=nominal.height, width=nominal.width, sequence=nominal.sequence)
    shapes = inferred(model, sizes, family).shapes
    # Not on the CPU, where torch does not count its attention.
    expected = counted(module(family).to("meta"), nominal)["Global"]
    assert sum(multiply_adds(node, shapes) for node in model.graph.node) == expected
    by_block = work_by_block(exported(family), {one.name: shapes[one.name] for one in inputs}, family)
    assert sum(by_block.values()) == expected
    assert {block_of(node) for node in model.graph.node} - {None} <= by_block.keys()


@pytest.mark.parametrize(
    "name",
    ["unet-sd1", "unet-bk-sdm-tiny", pytest.param("unet-sdxl", marks=pytest.mark.slow),
     pytest.param("transformer-sd3-medium", marks=pytest.mark.slow)],
)  # fmt: skip
def test_stages_are_even_at_true_size(name: str) -> None:
    with torch.device("meta"):
        denoiser = build(models()[name], "full").eval()
    published, nominal = PUBLISHED[name]
    work = counted(denoiser, nominal)
    assert work["Global"] / 1e9 == pytest.approx(published, rel=0.01)
    units = {unit: macs for unit, macs in work.items() if UNITS.fullmatch(unit)}
    graph = chain(list(units))
    candidates = boundaries(graph, {f"{unit}/value" for unit in units}, Inferred())
    assert len({block_of(node) for node in graph.node} - {None}) == len(candidates) + 1
    for count, largest in {**USUAL, **LARGEST.get(name, {})}.items():
        cuts = chosen(candidates, list(units.values()), count, name)
        marks = [0, *(cut.position for cut in cuts), len(units)]
        stages = [sum(list(units.values())[begin:end]) for begin, end in pairwise(marks)]
        assert max(stages) * count <= largest * sum(stages), [stage / sum(stages) for stage in stages]


def chain(units: list[str]) -> onnx.GraphProto:
    """A node for each module, one behind another."""
    names = ["sample", *(f"{unit}/value" for unit in units)]
    nodes = [helper.make_node("Identity", [read], [made], name=re.sub("value$", "Identity", made))
             for read, made in pairwise(names)]  # fmt: skip
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (names[0], names[-1])]
    return helper.make_graph(nodes, "chain", tensors[:1], tensors[1:])
