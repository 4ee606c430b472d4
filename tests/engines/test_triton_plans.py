"""`tandemrt export-triton` with plans of TensorRT, on files that stand in for them.

Triton itself is not here, and no plan can be built or run without its GPU: what Triton is told, and that it is given
the very file, is what is tested.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from tandemrt.engines.triton import RECORD_NAME, Record
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import RECIPES, Engine, InputRange, read_sidecar
from tandemrt.runtime.files import file_sha256

from ..runtime.engine_writing import write_engine
from .triton_repositories import Export, configs


def ranges(batches: tuple[int, int, int], sides: tuple[int, int, int]) -> dict[str, InputRange]:
    """A profile of the tiny decoder: least, best and most, of pictures and of their latents' sides."""
    shapes = [(batch, 4, side, side) for batch, side in zip(batches, sides, strict=True)]
    return {"latent_sample": InputRange(min=shapes[0], opt=shapes[1], max=shapes[2])}


NARROW = (ranges((1, 1, 1), (8, 8, 8)),)
WIDE = (ranges((1, 1, 4), (8, 8, 8)), ranges((1, 4, 8), (8, 8, 16)))


def write_plan(
    cache: Path, bundle: Path, *profiles: Mapping[str, InputRange], device: str = "sm90", **others: Any
) -> Path:
    """A file that stands in for a plan of the tiny decoder, in a cache; its folder."""
    opened = Bundle.open(bundle)
    before = set(engines_folder(cache).glob("*"))
    made_as = {"backend": "tensorrt", "backend_version": "10.13.2.6", "recipe": RECIPES["tensorrt"], **others}
    graph = onnx.load(opened.model_path("vae_decoder"))
    write_engine(cache, opened, "vae_decoder", device, graph, profiles=tuple(profiles), **made_as)
    (folder,) = set(engines_folder(cache).glob("*")) - before
    return folder


def decoder_on(cache: Path, *options: str) -> list[str]:
    return ["--component", "vae_decoder", "--target", "tensorrt:sm90", "--cache", str(cache), *options]


def test_plans(tiny_path: Path, tmp_path: Path, to_triton: Export) -> None:
    cache = tmp_path / "cache"
    wide, narrow = write_plan(cache, tiny_path, *WIDE), write_plan(cache, tiny_path, *NARROW)
    write_plan(cache, tiny_path, *NARROW, device="sm89")
    write_plan(cache, tiny_path, *NARROW, precision="bf16")
    write_plan(cache, tiny_path, *NARROW, backend="tensorrt-rtx", recipe=RECIPES["tensorrt-rtx"])
    out = to_triton(tiny_path, *decoder_on(cache, "--profile", "64..128x64..128"))
    (made,) = configs(out).values()
    engine: Engine = read_sidecar(wide)
    assert (made.platform, made.max_batch_size) == ("tensorrt_plan", 8)
    assert file_sha256(out / "vae_decoder" / "1" / "model.plan") == engine.files["model.engine"].sha256
    (group,) = made.instance_group
    assert (group.kind, list(group.profile)) == (ModelInstanceGroup.KIND_GPU, ["0", "1"])
    assert list(made.dynamic_batching.preferred_batch_size) == [4]
    assert made.parameters["tensorrt_version"].string_value == "10.13.2.6"
    assert [list(one.dims) for one in (*made.input, *made.output)] == [[4, -1, -1], [3, -1, -1]]
    record = msgspec.json.decode((out / RECORD_NAME).read_bytes(), type=Record)
    assert record.models["vae_decoder"].engine == wide.name
    shutil.rmtree(out)
    to_triton(tiny_path, *decoder_on(cache))
    record = msgspec.json.decode((out / RECORD_NAME).read_bytes(), type=Record)
    assert record.models["vae_decoder"].engine == narrow.name


def test_plans_beside_graphs(
    tiny_path: Path, tmp_path: Path, to_triton: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    write_plan(cache, tiny_path, *NARROW, flags={"version_compatible": True})
    out = to_triton(tiny_path, "--target", "vae_decoder=tensorrt:sm90:fp32", "--cache", str(cache))
    platforms = {name: made.platform for name, made in configs(out).items()}
    assert {name for name, platform in platforms.items() if platform == "tensorrt_plan"} == {"vae_decoder"}
    told = capsys.readouterr()
    assert "vae_decoder: tensorrt:sm90:fp32, batches up to 1, " in told.out
    assert "Triton has to bring TensorRT 10.13.2.6" in told.out
    assert "--backend-config=tensorrt,version-compatible=true" in told.err


def test_plans_that_do_not_fit(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, out = tmp_path / "cache", tmp_path / "models"
    cache.mkdir()

    def refused(*options: str) -> str:
        assert main(["export-triton", str(tiny_path), str(out), *decoder_on(cache, *options)]) == 1
        assert not out.exists()
        return capsys.readouterr().err

    build = (
        f"Run `tandemrt build-engine {tiny_path} --target tensorrt:sm90:fp32 --component vae_decoder --cache {cache} "
    )
    assert f"vae_decoder: no plan for tensorrt:sm90:fp32 fits: there is none (in {cache}). {build}" in refused()
    folder = write_plan(cache, tiny_path, *NARROW)
    told = refused("--profile", "64x64:b1..2", "--profile", "128x128:guided")
    assert f"{folder.name[:12]} has no profile for every call" in told
    assert "--profile 64x64:b1..2 --profile 128x128:b1:guided`." in told
    damaged = folder / "model.engine"
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    assert f"{damaged}: sha256" in refused()
    shutil.rmtree(folder)
    write_plan(cache, tiny_path, *NARROW)
    write_plan(cache, tiny_path, *NARROW, backend_version="10.14.1.48")
    assert "plans of several versions of TensorRT fit, got '10.13.2.6, 10.14.1.48'" in refused()
