"""The weights that engines are refitted with: read from a bundle's own files, always the base's with what LoRAs add."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tandemrt.engines.graph_files import spec
from tandemrt.engines.slots import lora_slots
from tandemrt.runtime.backends.refit import Refit
from tandemrt.runtime.base_weights import BaseWeights, Changes
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BundleError, EngineError, ExecutionError, RequestError
from tandemrt.runtime.lora_slots import Adapter, LowRank, slot_inputs

from .refitting import TRT
from .test_build import FEEDS


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_weights_are_those_that_onnx_reads(tiny: Bundle, name: str) -> None:
    """In a file beside the model, and in the model itself."""
    path = tiny.model_path(name)
    base, read = BaseWeights(path), onnx.load(path).graph.initializer
    assert set(base) == {one.name for one in read}
    for one in read:
        np.testing.assert_array_equal(base[one.name], numpy_helper.to_array(one))
        assert (base[one.name].dtype, base[one.name].shape) == (numpy_helper.to_array(one).dtype, tuple(one.dims))


def test_weights_that_are_stored_otherwise(tiny: Bundle, tmp_path: Path) -> None:
    model, path = onnx.load(tiny.model_path("text_encoder")), tmp_path / "model.onnx"
    listed = helper.make_tensor("listed", TensorProto.FLOAT, (2, 2), [1.0, 2.0, 3.0, 4.0])
    halves = helper.make_tensor("halves", TensorProto.FLOAT16, (2,), [1.0, 2.0])
    model.graph.initializer.extend([listed, halves])
    onnx.save(model, path)
    base = BaseWeights(path)
    np.testing.assert_array_equal(base["listed"], [[1, 2], [3, 4]])
    assert "halves" not in base  # as numbers of another type
    short = numpy_helper.from_array(np.ones(4, np.float32), "short")
    short.raw_data = short.raw_data[:-1]
    model.graph.initializer.append(short)
    onnx.save(model, path)
    with pytest.raises(BundleError, match=r"weight 'short' of shape \(4,\) in other bytes"):
        BaseWeights(path)


def test_a_file_of_weights_that_is_too_short(tiny: Bundle, tmp_path: Path) -> None:
    model = tiny.model_path("unet")
    (tmp_path / model.name).write_bytes(model.read_bytes())
    (tmp_path / "model.onnx.data").write_bytes((model.parent / "model.onnx.data").read_bytes()[:40])
    base = BaseWeights(tmp_path / model.name)
    with pytest.raises(BundleError, match=r"weight '.*' cannot be read .* Export the bundle again"):
        list(base.values())


def test_weights_are_always_made_from_the_base() -> None:
    random = np.random.default_rng(0)
    base: Mapping[str, Any] = {name: random.standard_normal((3, 4)).astype(np.float16) for name in "abc"}
    engine = {name: array.copy() for name, array in base.items()}
    refit = Refit(TRT, SimpleNamespace(messages=["too large"]), "unet")
    change = random.standard_normal((3, 4)).astype(np.float32)
    for changes in ({"a": change}, {"c": change}, {"a": 2 * change, "c": -change}, {}, {"b": change}, {}):
        refit.apply(engine, base, changes)
        for name, array in base.items():
            added = changes.get(name, np.float32(0))
            np.testing.assert_array_equal(engine[name], (array.astype(np.float32) + added).astype(np.float16))
    with pytest.raises(EngineError, match=r"unet: weights to refit, got \['z'\]"):
        refit.apply(engine, base, {"z": change})
    with pytest.raises(EngineError, match=r"unet: weights to refit, got \['z'\].*--lora-slots"):
        refit.apply({**engine, "z": change}, base, {"z": change})
    with pytest.raises(ExecutionError, match=r"LoRAs in weight 'a', got 'NaN or Inf', expected finite .* float16"):
        refit.apply(engine, base, {"a": 1e5 * np.abs(change) + 1e5})
    with pytest.raises(EngineError, match=r"unet: weights that are refitted with them, got \['b'\]"):
        refit.apply(engine, {name: base[name] for name in "ac"}, {"a": change})
    with pytest.raises(ExecutionError, match=r"shape of the change of weight 'a', got \(4, 3\)"):
        refit.apply(engine, base, {"a": change.T})
    with pytest.raises(ExecutionError, match=r"weight 'c' of shape \(3, 4\) is refused \(too large\)"):
        refit.apply({**engine, "c": np.zeros(1)}, base, {"c": change})
    with pytest.raises(ExecutionError, match=r"weight 'c' of shape \(3, 4\) is refused \(it did not say why\)"):
        refit.apply({**engine, "c": np.zeros(1)}, base, {"c": change})


def test_a_change_that_overflows_is_refused_without_a_warning(tiny: Bundle) -> None:
    base = BaseWeights(tiny.model_path("unet"))
    module, projection = next(iter(base.projections.items()))
    made, read = projection.shape[0], int(np.prod(projection.shape[1:]))
    huge = LowRank(np.full((1, read), 1e30, np.float32), np.full((made, 1), 1e30, np.float32))
    changes = Changes(base, [Adapter("up", {module: huge}, 2.0), Adapter("down", {module: huge}, -2.0)])
    refit = Refit(TRT, SimpleNamespace(messages=[]), "unet")
    with pytest.raises(ExecutionError, match="got 'NaN or Inf'"):
        refit.apply(dict(base), base, changes)


def test_what_loras_add_equals_their_slots(tiny: Bundle, tmp_path: Path) -> None:
    path = tiny.model_path("unet")
    base, random = BaseWeights(path), np.random.default_rng(5)

    def adapter(name: str, scale: float, *modules: tuple[str, int, int]) -> Adapter:
        changes = {
            module: LowRank(
                random.standard_normal((2, read)).astype(np.float32),
                random.standard_normal((made, 2)).astype(np.float32),
            )
            for module, read, made in modules
        }
        return Adapter(name, changes, scale)

    adapters = (adapter("one", 0.5, ("matmul_1", 8, 8), ("conv_6", 36, 8)), adapter("two", -1.0, ("conv_6", 36, 8)))
    added = Changes(base, adapters)
    assert len(added) == 2
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in added:
            values = numpy_helper.to_array(tensor) + added[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    changed = onnxruntime.InferenceSession(model.SerializeToString()).run(None, FEEDS)[0]
    slotted = lora_slots(onnx.load(path), slots=2, rank=2)
    session = onnxruntime.InferenceSession(slotted.SerializeToString())
    given = slot_inputs([spec(value, "unet") for value in slotted.graph.input], adapters)
    np.testing.assert_allclose(session.run(None, {**FEEDS, **given})[0], changed, atol=1e-4)
    assert np.abs(onnxruntime.InferenceSession(path).run(None, FEEDS)[0] - changed).max() > 1e-2
    with pytest.raises(RequestError, match="three: no such projection, got 'other'"):
        Changes(base, (adapter("three", 1.0, ("other", 8, 8)),))
    with pytest.raises(RequestError, match=r"three: shape of matmul_1, got \(8, 4\), expected that of \(8, 8\)"):
        Changes(base, (adapter("three", 1.0, ("matmul_1", 4, 8)),))
