"""`tandemrt verify`: what it says it has checked, and what it does with the export's comparison."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from tandemrt.export.plan import Added, ExportPlan, LoraSource
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.manifest import Evidence

from .tiny_bundle import resign, write_tiny_bundle

Parity = Mapping[str, tuple[Evidence, ...]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "bundle"
    write_tiny_bundle(folder)
    return folder


class Comparison(ModuleType):
    """Stands for the export's verification, which needs torch and a checkpoint."""

    def __init__(self, parity: Parity) -> None:
        super().__init__("tandemrt.export.verify")
        self.parity, self.asked = parity, None

    def verify_bundle(self, bundle: Bundle, plan: ExportPlan, progress: Callable[[str, int, int], None]) -> Parity:
        self.asked = plan
        progress("unet: verify", 1, 1)
        return self.parity


def compared(monkeypatch: pytest.MonkeyPatch, *values: float) -> Comparison:
    evidence = tuple(
        Evidence(metric="max_relative_error", value=value, threshold=1e-4, input_shapes={"sample": (1, 4, 8, 8)})
        for value in values
    )
    comparison = Comparison({"unet": evidence})
    monkeypatch.setitem(sys.modules, "tandemrt.export.verify", comparison)
    return comparison


def test_without_a_checkpoint_the_rest_is_said_to_be_unchecked(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["verify", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert Bundle.open(bundle).digest in lines[0]
    assert lines[1].startswith("checked: the folder holds the files of the manifest and no others")
    assert lines[2:] == [
        "not checked: the difference from PyTorch of text_encoder, unet, unet_small, vae_decoder, vae_decoder_tiny; "
        "give --checkpoint DIR"
    ]


def test_sources_are_compared_as_they_were_exported(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = compared(monkeypatch, 1e-6, 2e-6)
    options = ["--checkpoint", "large", "--small", "small", "--tiny-vae", "tiny", "--denoiser", "one-step"]
    options += ["--vae", "fixed", "--tokenizer", "words", "--lora", "a:0.5", "--lora", "b", "--allow-pickle"]
    assert main(["verify", str(bundle), *options, "--json"]) == 0
    assert comparison.asked == ExportPlan(
        Path("large"),
        bundle,
        (Added("unet_small", Path("small")), Added("vae_decoder_tiny", Path("tiny"))),
        tokenizer=Path("words"),
        denoiser=Path("one-step"),
        vae=Path("fixed"),
        loras=(LoraSource(Path("a"), 0.5), LoraSource(Path("b"))),
        allow_pickle=True,
    )
    facts = json.loads(capsys.readouterr().out)
    assert [each["value"] for each in facts["parity"]["unet"]] == [1e-6, 2e-6]
    assert facts["parity_not_checked"] == ["text_encoder", "unet_small", "vae_decoder", "vae_decoder_tiny"]
    assert main(["verify", str(bundle), *options]) == 0
    assert "  unet  max_relative_error  2e-06  at most 0.0001\n" in capsys.readouterr().out


@pytest.mark.parametrize("value", [2e-4, float("inf"), float("nan")])
def test_a_component_too_far_from_pytorch_fails(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    compared(monkeypatch, 1e-6, value)
    assert main(["verify", str(bundle), "--checkpoint", "large"]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    expected = (
        f"tandemrt verify: {bundle}: unet: max_relative_error to PyTorch at {{'sample': (1, 4, 8, 8)}}, got {value}"
    )
    assert stderr.splitlines()[-1].startswith(expected)


def test_a_checkpoint_without_torch_says_what_to_install(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(compared(monkeypatch), "verify_bundle", missing)
    assert main(["verify", str(bundle), "--checkpoint", "large"]) == 1
    assert capsys.readouterr().err == (
        'tandemrt verify: needs torch, which cannot be imported here. Install it: pip install "tandemrt[export,cpu]"\n'
    )


@pytest.mark.parametrize("options", [["--small", "s"], ["--add", "unet_small=s"]])
def test_a_source_of_a_component_the_bundle_has_not_is_named_by_its_option(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    smaller = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    components = {name: each for name, each in Bundle.open(bundle).manifest.components.items() if name != "unet_small"}
    resign(smaller, lambda manifest: msgspec.structs.replace(manifest, components=components))
    assert main(["verify", str(smaller), "--checkpoint", "c", *options]) == 2
    assert "--small or --add: no such component, got 'unet_small', expected one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--small", "s"], "--checkpoint: not given beside other sources"),
        (["--lora", "l"], "--checkpoint: not given beside other sources"),
        (["--checkpoint", "c", "--lora", "l:inf"], "--lora: scale of l, got inf, expected a finite number"),
        (["--checkpoint", "c", "--add", "unet_small"], "--add: not a source, got 'unet_small', expected NAME=DIR"),
        (["--checkpoint", "c", "--small", "s", "--add", "unet_small=t"], "--add: a component given twice"),
        (["--checkpoint", "c", "--add", "unet_huge=t"], "--add: no such component, got 'unet_huge', expected one of"),
    ],
)
def test_bad_sources(bundle: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["verify", str(bundle), *options]) == 2
    stdout, stderr = capsys.readouterr()
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert message in stderr
