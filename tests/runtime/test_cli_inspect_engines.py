"""`tandemrt inspect --engines`: what the sidecars say, of this bundle's engines alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import (
    FORMAT,
    LAYERS_NAME,
    SIDECAR_NAME,
    Engine,
    Ingredients,
    InputRange,
    Layer,
    origin_of,
    weights_of,
)
from tandemrt.runtime.manifest import FileRecord

from .tiny_bundle import write_tiny_bundle

CONTENT = bytes(2_000_000)
LAYERS = (
    Layer(name="one", kind="correlation", precision="half", nodes=("a/Conv", "a/Relu")),
    Layer(name="two", kind="kgen", precision="float", nodes=("b/Mul",)),
)


def write_engine(cache: Path, bundle: Bundle, profile: str = "wide", of: str = "vae_decoder", **facts: object) -> Path:
    made_of = Ingredients(
        **{
            "graph": origin_of(bundle, of),
            "origin": origin_of(bundle, of),
            "weights": weights_of(bundle, of),
            "profiles": ({"latent_sample": InputRange(min=(1, 4, 8, 8), opt=(1, 4, 8, 8), max=(1, 4, 8, 16))},),
            "backend": "tensorrt-rtx",
            "backend_version": "1.7",
            "device": "sm89",
            "architecture": "linux-x86_64",
            "precision": "fp32",
            "flags": {},
            "recipe": 1,
            **facts,
        }
    )
    engine = Engine(
        format=FORMAT,
        component="decoder_elsewhere",
        ingredients=made_of,
        files={"engine.plan": FileRecord(size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())},
        inputs=(),
        outputs=(),
        profile_names=(profile,),
        profile_memory_bytes=(3_000_000,),
        layer_count=2,
        multiply_adds={f"block.{index}": (1 + index) * 10**8 for index in range(9)},
        build_s=1.5,
        peak_memory_bytes=400_000_000,
        versions={"tandemrt": "0.1.0"},
    )
    folder = engines_folder(cache) / made_of.key
    folder.mkdir(parents=True)
    (folder / SIDECAR_NAME).write_bytes(msgspec.json.encode(engine))
    (folder / LAYERS_NAME).write_bytes(msgspec.json.encode(LAYERS))
    (folder / "engine.plan").write_bytes(CONTENT)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    write_tiny_bundle(tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def test_engines_are_shown(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_engine(tmp_path, bundle)
    other = write_engine(tmp_path, bundle, origin="0" * 64)
    damaged = write_engine(tmp_path, bundle, recipe=2)
    (damaged / SIDECAR_NAME).write_bytes(b"")
    assert main(["inspect", str(bundle.path), "--engines", "--cache", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    row = "vae_decoder  tensorrt-rtx:sm89:fp32  plain    wide     tensorrt-rtx 1.7  2.0 MB  1.5 s  400 MB       "
    assert f"{row}{folder.name[:12]}  whole" in out
    for told in (
        "latent_sample (1, 4, 8, 8..16) tuned for (1, 4, 8, 8); 3.0 MB of scratch memory",
        "2: 1 correlation, 1 kgen",
        "1 half, 1 float",
        "2 nodes in 1 layers",
        "4.5 G multiply-adds a call: block.8 20.0%, block.7 17.8%",
        "block.1 4.4%, 1 others 2.2%",
        f"{damaged}: unusable (",
    ):
        assert told in out
    assert folder.name[:12] in out
    assert other.name[:12] not in out


def test_engines_are_in_the_order_of_components_targets_and_profiles(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [
        ("unet", "sm120", "64"), ("unet", "sm89", "128"), ("unet", "sm89", "64"), ("vae_decoder", "sm89", "64"),
    ]  # fmt: skip
    for recipe, (of, device, profile) in enumerate(reversed(wanted)):
        write_engine(tmp_path, bundle, profile, of, device=device, recipe=recipe)
    assert main(["inspect", str(bundle.path), "--engines", "--cache", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("whole")]
    assert [(row[0], row[1].split(":")[1], row[3]) for row in rows] == wanted


def test_a_damaged_engine_is_not_shown_as_whole(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", str(bundle.path), "--engines", "--cache", str(tmp_path)]
    folder = write_engine(tmp_path, bundle)
    for content, told in ((CONTENT[1:], "size, got 1999999"), (b"x" + CONTENT[1:], "sha256, got")):
        (folder / "engine.plan").write_bytes(content)
        assert main(arguments) == 1
        out = capsys.readouterr().out
        assert f"{folder.name[:12]}  damaged" in out
        assert f"engine.plan: {told}" in out
    (folder / LAYERS_NAME).write_bytes(b"[")
    assert main([*arguments, "--json"]) == 1
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert "engine.plan: sha256" in engine["damage"]
    assert "layers.json: not an engine's layers" in engine["layers_error"]
    (folder / LAYERS_NAME).unlink()
    assert main(arguments) == 1
    assert "layers.json: cannot be read" in capsys.readouterr().out


def test_engines_as_json(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_engine(tmp_path, bundle)
    assert main(["inspect", str(bundle.path), "--engines", "--cache", str(tmp_path), "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert (engine["folder"], engine["component"]) == (str(folder), "vae_decoder")
    assert (engine["size_bytes"], engine["layer_kinds"]) == (2_000_000, {"correlation": 1, "kgen": 1})
    assert engine["layers"][0]["nodes"] == ["a/Conv", "a/Relu"]
    assert engine["multiply_adds"]["block.8"] == 900_000_000


def test_a_cache_without_engines_says_so(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle.path), "--engines", "--cache", str(tmp_path)]) == 0
    assert "no engines in the cache" in capsys.readouterr().out
    assert main(["inspect", str(bundle.path), "--cache", str(tmp_path)]) == 2
    assert "--cache: is of engines only" in capsys.readouterr().err
