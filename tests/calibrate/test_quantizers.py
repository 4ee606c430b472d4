"""The ways to quantize a graph, as a search uses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tandemrt.calibrate.int8 import Int8Settings
from tandemrt.calibrate.ledger import Ledger
from tandemrt.calibrate.quantizers import FORMATS, Work
from tandemrt.calibrate.ranges import Limits, silent
from tandemrt.runtime.manifest import QuantizationFormat

from .small_graphs import samples_of, write_block

SETTINGS = Int8Settings(limits=Limits(threads=1))


@pytest.mark.parametrize("form", ["int8", "fp8", "int8-weights", "int4-weights"])
def test_every_layer_that_is_kept_leaves_fewer_quantized_where_two_share_a_weight(
    form: QuantizationFormat, tmp_path: Path
) -> None:
    """To keep one of the two keeps both: neither is a candidate of its own."""
    model = write_block(tmp_path / "float", shared=True)

    def samples(most: int) -> Iterator[Mapping[str, Any]]:
        return islice(samples_of(4)(), most)

    with Ledger(tmp_path / "found", {}) as ledger:
        work = Work(model, samples, 4, (), tmp_path / "ranges.npz", ledger, silent)
        quantizer = FORMATS[form](work, SETTINGS)
        assert ("to_q/MatMul", "to_k/MatMul") in quantizer.layers
        ranked = [one.layers for one in quantizer.ranked()]
        assert sorted(ranked) == sorted(quantizer.layers)
        every = {name for names in ranked for name in names}
        for count in range(len(ranked)):
            kept = {name for names in ranked[:count] for name in names}
            written = quantizer.write(tmp_path / str(count) / "model.onnx", tuple(kept))
            assert set(written.layers) == every - kept
        named = FORMATS[form](
            Work(model, samples, 4, ("to_k/MatMul",), tmp_path / "ranges.npz", ledger, silent), SETTINGS
        )
        assert {name for names in named.layers for name in names} == every - {"to_q/MatMul", "to_k/MatMul"}
