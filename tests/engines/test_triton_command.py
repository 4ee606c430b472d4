"""`tandemrt export-triton` as a command: what is refused, where it writes, and that it writes all of it or nothing."""

from __future__ import annotations

import errno
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tandemrt.engines import triton
from tandemrt.engines.triton import RECORD_NAME
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import ExportError
from tandemrt.runtime.files import file_sha256

from .triton_repositories import SIZES, Export, configs


@pytest.mark.parametrize(
    ("status", "told", "options"),
    [
        (2, "Triton runs plans of TensorRT, and no engines of TensorRT-RTX, got 'tensorrt-rtx:sm89'",
         ["--target", "tensorrt-rtx:sm89"]),
        (2, "not exported for Triton, got 'openvino:cpu', expected one of onnxruntime:cpu, onnxruntime:cuda, tensorrt:",
         ["--target", "openvino:cpu"]),
        (2, "not exported for Triton, got 'unet=onnxruntime:tensorrt'", ["--target", "unet=onnxruntime:tensorrt"]),
        (2, "no component's name, got '=onnxruntime:cpu'", ["--target", "=onnxruntime:cpu"]),
        (2, "--target: given twice, got 'unet'",
         ["--target", "unet=onnxruntime:cpu", "--target", "unet=tensorrt:sm90"]),
        (2, "--component: no such component, got 'unet_smal'.*Did you mean", ["--component", "unet_smal"]),
        (2, "--component: given twice, got 'unet'", ["--component", "unet", "--component", "unet"]),
        (2, "--target: no such component, got 'nothing'", ["--target", "nothing=onnxruntime:cpu"]),
        (2, "--target: for a component that is left out, got 'unet'",
         ["--component", "vae_decoder", "--target", "unet=onnxruntime:cuda"]),
        (2, "--profile 65x65: width, got 65, expected a multiple of 16 pixels", ["--profile", "65x65"]),
        (2, "cache: not a folder that is there", ["--cache", "nowhere"]),
        (1, "precision of the exported model, got 'fp32'", ["--target", "onnxruntime:cuda:fp16"]),
        (1, "nothing in it is quantized to int8", ["--target", "onnxruntime:cpu:int8"]),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(
    status: int, told: str, options: list[str], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-triton", str(tiny_path), str(tmp_path / "models"), *options]) == status
    err = capsys.readouterr().err
    assert re.search(told, err), err
    assert not (tmp_path / "models").exists()


def test_places(tiny_path: Path, tmp_path: Path, to_triton: Export, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(bundle: Path, place: Path, *options: str) -> str:
        assert main(["export-triton", str(bundle), str(place), *options]) == 1
        return capsys.readouterr().err

    assert "nothing: not a bundle folder" in refused(tmp_path / "nothing", tmp_path / "models")
    out = to_triton(tiny_path, "--component", "unet")
    assert "exists already. Give another folder, or --force to replace a repository." in refused(tiny_path, out)
    to_triton(tiny_path, "--component", "vae_decoder", "--force")
    assert configs(out).keys() == {"vae_decoder"}
    (out / "vae_decoder" / "2").mkdir()
    told = refused(tiny_path, out, "--force")
    assert "2: is not of the repository, so --force does not remove it" in told
    assert f"expected a folder with {RECORD_NAME}" in refused(tiny_path, tiny_path.parent, "--force")
    assert "lies inside the bundle" in refused(tiny_path, tiny_path / "models")


def test_the_plan_is_shown(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export-triton", str(tiny_path), str(tmp_path / "models"), "--profile", SIZES, "--print-plan"]
    assert main(command) == 0
    assert "unet: onnxruntime:cpu:fp32, no batches, 0.0 MB" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)["models"]}
    assert models["vae_decoder"]["max_batch_size"] == 4
    assert list(tmp_path.iterdir()) == []


def test_a_repository_is_whole_or_not_there(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, copied = triton._copy, []

    def fills(source: Path, *others: Any) -> None:
        if copied:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        copied.append(source)
        copy(source, *others)

    monkeypatch.setattr(triton, "_copy", fills)
    assert main(["export-triton", str(tiny_path), str(tmp_path / "a" / "models")]) == 1
    assert "cannot be written (No space left on device). Free space or give another folder." in capsys.readouterr().err
    assert copied
    assert list(tmp_path.iterdir()) == []


def test_weights_pass_by_a_few_at_a_time(tmp_path: Path) -> None:
    source, place = tmp_path / "weights", tmp_path / "copy"
    with source.open("wb") as stream:
        stream.truncate(64 << 20)
    record = triton.FileRecord(size=64 << 20, sha256=file_sha256(source))
    tracemalloc.start()
    triton._copy(source, place, record)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert place.stat().st_size == 64 << 20
    assert peak < 16 << 20
    with pytest.raises(ExportError, match=r"weights: changed while it was copied, got '.*', expected .* Run it again"):
        triton._copy(source, tmp_path / "other", msgspec.structs.replace(record, sha256="0" * 64))
