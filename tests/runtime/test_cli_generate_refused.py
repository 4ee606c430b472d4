"""`tandemrt generate` on bad input, full disks and missing backends: one line, and nothing half done."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from .test_cli_generate import STEPS, generate, names
from .tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused") / "bundle"
    write_tiny_bundle(folder)
    return folder


BAD_INPUT = {
    "not a bundle": (["--prompt", "red"], 1, "no-such-bundle: not a bundle folder"),
    "size": (["--prompt", "red", "--size", "60"], 2, "height: not usable, got 60, expected a positive multiple of 16"),
    "size 100": (
        ["--prompt", "red", "--size", "100"],
        2,
        "got 100, expected a positive multiple of 16 pixels, at most 16384. Ask for 96.",
    ),
    "many steps": (["--prompt", "red", "--steps", "1001"], 2, "got 1001, expected a whole number in 1..1000"),
    "size 0": (["--prompt", "red", "--size", "0"], 2, "height: not usable, got 0"),
    "size of words": (["--prompt", "red", "--size", "big"], 2, "--size: not a size, got 'big'"),
    "size twice": (["--prompt", "red", "--size", "64", "--width", "64"], 2, "--size: given beside --width"),
    "no steps": (["--prompt", "red", "--steps", "0,0"], 2, "steps: number of steps in all, got 0, expected 1 or more"),
    "unknown denoiser": (["--prompt", "red", "--steps", "unit:5"], 2, "steps: unknown denoiser, got 'unit'"),
    "steps of words": (["--prompt", "red", "--steps", "ten"], 2, "steps: not a number of steps, got 'ten'"),
    "steps twice": (["--prompt", "red", "--steps", "4", "--num-inference-steps", "4"], 2, "steps: given beside"),
    "guidance": (["--prompt", "red", "--guidance-scale", "nan"], 2, "guidance_scale: not usable, got nan"),
    "interval": (["--prompt", "red", "--guidance-interval", "0.8,0.2"], 2, "guidance_interval: fractions"),
    "interval of one": (["--prompt", "red", "--guidance-interval", "0.8"], 2, "--guidance-interval: not an interval"),
    "seed": (["--prompt", "red", "--seed", str(2**64)], 2, f"seed: out of range, got {2**64}"),
    "last seed": (["--prompt", "red", "--seed", str(2**64 - 1), "--batch-size", "2"], 2, "seed: out of range"),
    "pictures": (["--prompt", "red", "--batch-size", "0"], 2, "num_images_per_prompt: not usable, got 0"),
    "no prompt": ([], 2, "--prompt: no prompt given"),
    "not text": (["--prompt", "r\udcffd"], 2, "--prompt: not text at character 1, got 'r\\udcffd'"),
    "solver": (["--prompt", "red", "--solver", "magic"], 2, "solver: "),
    "solver key": (["--prompt", "red", "--solver-config", "use_magic=true"], 2, "use_magic"),
    "solver value": (["--prompt", "red", "--solver-config", "use_karras_sigmas=True"], 2, "--solver-config use_karras"),
    "time steps": (["--prompt", "red", "--timesteps", "999,x"], 2, "--timesteps: not time steps, got '999,x'"),
    "decoder": (["--prompt", "red", "--decoder", "vae"], 2, "decoder: unknown, got 'vae', expected one of vae_decoder"),
    "target": (["--prompt", "red", "--target", "cuda"], 2, "target: backend, got 'cuda'"),
    "absent target": (["--prompt", "red", "--target", "openvino:npu:fp16"], 1, "target: this version of tandemrt"),
    "precision": (
        ["--prompt", "red", "--target", "onnxruntime:cpu:fp16"],
        1,
        "text_encoder: precision of the exported",
    ),
    "no threads": (["--prompt", "red", "--threads", "0"], 2, "--threads: number of threads, got 0, expected a whole"),
    "threads": (["--prompt", "red", "--threads", "3000000000"], 2, "--threads: number of threads, got 3000000000"),
    "previews": (["--prompt", "red", "--previews", "-1"], 2, "previews: not usable, got -1"),
    "seed device": (["--prompt", "red", "--seed-device", "tpu"], 2, "argument --seed-device: invalid choice"),
}


@pytest.mark.parametrize("only", [[], ["--print-plan"]])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_no_folder(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, only: list[str]
) -> None:
    arguments, status, message = BAD_INPUT[case]
    opened = Path("no-such-bundle") if case == "not a bundle" else bundle
    assert generate(opened, tmp_path / "out", *arguments, *only) == status
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert stderr.startswith("tandemrt generate: ")
    assert message in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"red\nbl\xe5\n", "not UTF-8 at line 2, byte 6, got b'\\xe5\\n', expected UTF-8 text"),
        ("red".encode("utf-16"), "not UTF-8 at line 1, byte 0"),
        (b"\n \n", "prompts.txt: holds no prompt, expected one prompt a line"),
        (None, "cannot be read (No such file or directory), expected a text file with one prompt a line. Check"),
    ],
)
def test_bad_prompts_files(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    assert generate(bundle, tmp_path / "out", "--prompts-file", str(file)) == 2
    stderr = capsys.readouterr().err
    assert f"--prompts-file {file}: " in stderr
    assert message in stderr
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert generate(bundle, out, "--prompt", "red", *STEPS) == 1
    assert capsys.readouterr().err.startswith(f"tandemrt generate: {out}: cannot be written (")
    assert out.read_text() == "mine"


def test_space_is_the_remedy_for_a_full_disk_alone(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    assert generate(bundle, tmp_path / "file" / "out", "--prompt", "red", *STEPS) == 1
    assert capsys.readouterr().err.endswith("(Not a directory). Give another --output-dir.\n")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tandemrt.runtime.cli.pictures.save_png", full)
    assert generate(bundle, tmp_path / "out", "--prompt", "red", *STEPS) == 1
    assert "(No space left on device). Free some space, or give another --output-dir." in capsys.readouterr().err


def test_nothing_is_made_where_the_backend_is_missing(bundle: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules.update(onnxruntime=None, openvino=None)\n"
        "from tandemrt.runtime.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["generate", str(bundle), "--prompt", "red", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert 'pip install "tandemrt[cpu]"' in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_half_written(bundle: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: the write of the picture fails in the middle."""
    command = [sys.executable, "-m", "tandemrt.runtime.cli", "generate", str(bundle), "--prompt", "red", "--seed", "1"]
    done = subprocess.run(
        [*command, "--size", "256", "--output-dir", str(tmp_path / "out"), *STEPS],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"tandemrt generate: {tmp_path / 'out' / '0001-seed1-red.png'}: cannot be written (")
    assert names(tmp_path) == []
