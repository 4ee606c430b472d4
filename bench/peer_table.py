"""What TandemRT is measured beside, and the environment that each needs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandemrt.runtime.arguments import did_you_mean
from tandemrt.runtime.errors import ArgumentError, BenchmarkError

_SETUP_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A program that paints the same picture.

    script: of `bench/peers`. requirements: what pip installs for it, none where this interpreter has it. reads: whether
    it is given the checkpoint or the bundle. hybrid: whether it runs plans of several denoisers. settings: more of its
    job. devices: what it can be told to run on.
    """

    script: str
    requirements: tuple[str, ...]
    reads: str
    hybrid: bool
    settings: Mapping[str, Any]
    devices: tuple[str, ...] = ("cpu",)


def _diffusers(**settings: Any) -> Peer:
    return Peer("torch_diffusers.py", (), "checkpoint", True, settings, devices=("cpu", "cuda"))


_OPENVINO_GENAI = ("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "transformers==5.23.0")
PEERS: Mapping[str, Peer] = {
    "diffusers": _diffusers(dtype="float32", compile=False),
    "diffusers-bf16": _diffusers(dtype="bfloat16", compile=False),
    "diffusers-compile": _diffusers(dtype="float32", compile=True),
    "optimum": Peer(
        "optimum_onnx.py",
        ("optimum-onnx[onnxruntime]==0.1.0", "diffusers==0.39.0", "transformers==4.57.6", "torch==2.13.0"),
        "bundle",
        False,
        {},
    ),
    "openvino-genai": Peer("openvino_genai_pipeline.py", _OPENVINO_GENAI, "bundle", False, {"precision": "f32"}),
    "openvino-genai-bf16": Peer("openvino_genai_pipeline.py", _OPENVINO_GENAI, "bundle", False, {"precision": "bf16"}),
    "sdcpp": Peer(
        "stable_diffusion_cpp_pipeline.py",
        ("stable-diffusion-cpp-python==0.4.7", "numpy==2.4.6"),
        "checkpoint",
        False,
        {},
    ),
}


def named_peer(name: str, asked_by: str = "--peer") -> Peer:
    """The peer of this name. asked_by: the argument that names it. ArgumentError where there is none."""
    if name not in PEERS:
        expected = f"one of {', '.join(PEERS)}"
        raise ArgumentError(asked_by, "unknown peer", got=name, expected=expected, remedy=did_you_mean(name, PEERS))
    return PEERS[name]


def interpreter(name: str, cache: Path) -> str:
    """The interpreter that runs a peer.

    Raises:
        BenchmarkError: its environment is not there.
    """
    peer = named_peer(name)
    if not peer.requirements:
        return sys.executable
    python = _environment(peer, cache) / "bin" / "python"
    if not python.is_file():
        remedy = f"Set it up, which installs it from the package registry: tandemrt bench setup {name}"
        raise BenchmarkError(name, "has no environment yet", remedy=remedy)
    return str(python)


def set_up(name: str, cache: Path, wheels: Path | None = None) -> Path:
    """Make the environment of a peer that needs one, whole or not at all; returns its folder, also if it is there.

    wheels: the folder that `collect` filled; None for the package registry.

    Raises:
        BenchmarkError: the environment cannot be made, or pip failed; the message ends with what it said.
    """
    peer = named_peer(name)
    folder = _environment(peer, cache)
    if folder.is_dir():
        return folder
    # Its scripts would name the path it was made at; its interpreter, which is all that is used, goes by its own.
    making = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    source = () if wheels is None else ("--no-index", "--find-links", str(wheels))
    try:
        _make_environment(name, making)
        _pip(name, str(making / "bin" / "python"), "install", *source)
        os.replace(making, folder)  # noqa: PTH105 — folders, on one file system
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def collect(name: str, wheels: Path) -> None:
    """Fill a folder with the wheels that a peer needs, for this interpreter and system; sources are built.

    Raises:
        BenchmarkError: pip failed; the message ends with what it said.
    """
    if named_peer(name).requirements:
        _pip(name, sys.executable, "wheel", "--wheel-dir", str(wheels))


def _make_environment(name: str, folder: Path) -> None:
    """Make an environment with pip in it. BenchmarkError where this interpreter cannot."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        venv.create(folder, with_pip=True)
    except subprocess.CalledProcessError as error:
        remedy = "Install what this interpreter's `venv` and `ensurepip` lack: python3-venv, on Debian and Ubuntu."
        raise BenchmarkError(name, "its environment cannot be given pip", remedy=remedy) from error
    except OSError as error:
        raise BenchmarkError(name, f"its environment cannot be made ({error.strerror})", got=str(folder)) from error


def _pip(name: str, python: str, *words: str) -> None:
    """Have pip do something with what a peer requires; what it started, such as compilers, ends with it."""
    command = [python, "-m", "pip", *words, "--quiet", *PEERS[name].requirements]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    late = ""
    with subprocess.Popen(command, text=True, errors="replace", start_new_session=True, **pipes) as pip:
        try:
            _, said = pip.communicate(timeout=_SETUP_TIMEOUT_S)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(pip.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            _, said = pip.communicate()
            late = f": pip took longer than {_SETUP_TIMEOUT_S:g} s"
    if pip.returncode:
        raise BenchmarkError(name, f"cannot be installed{late}", remedy=said.strip()[-1500:])


def _environment(peer: Peer, cache: Path) -> Path:
    """The folder of what a peer requires; peers that require the same share it."""
    distribution = re.split(r"[\[=]", peer.requirements[0])[0]
    named = "\n".join((*peer.requirements, sys.version))
    return cache / "peers" / f"{distribution}-{hashlib.sha256(named.encode()).hexdigest()[:12]}"
