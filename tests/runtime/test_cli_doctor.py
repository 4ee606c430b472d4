"""`tandemrt doctor`: what it reads of a machine, and that nothing being there is no error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandemrt.runtime import targets
from tandemrt.runtime.cli import main
from tandemrt.runtime.cli.machine import nvidia_devices, parse_cpuinfo, parse_meminfo


def test_doctor_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    stdout, stderr = capsys.readouterr()
    assert "\n  onnxruntime:cpu\n" in stdout
    assert stderr == ""


def test_doctor_tells_what_builds_here_and_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "has_nvidia_driver", lambda: False)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (place,) = (index for index, line in enumerate(lines) if line.startswith("tensorrt-rtx "))
    assert lines[place].endswith(": builds engines here, does not run them")
    assert lines[place + 1] == "  no NVIDIA driver is running here"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert main(["doctor", "--json"]) == 0
    backends = {backend["backend"]: backend for backend in json.loads(capsys.readouterr().out)["backends"]}
    builds = {name: backend["builds"] for name, backend in backends.items()}
    assert builds == {"onnxruntime": True, "openvino": True, "tensorrt-rtx": False, "tensorrt": False}


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["python"]["executable"] == sys.executable
    assert facts["machine"]["usable_cores"] >= 1
    backends = {backend["backend"]: backend for backend in facts["backends"]}
    assert backends["onnxruntime"]["targets"] == ["onnxruntime:cpu"]
    assert backends["onnxruntime"]["version"]
    assert facts["export"] == {"available": True, "missing": []}


def test_doctor_in_a_bare_environment() -> None:
    """Only what the base install brings: every other distribution is hidden, and no module of theirs imports."""
    script = (
        "import sys\n"
        "from importlib import metadata\n"
        "base = {'tandemrt', 'numpy', 'tokenizers', 'pillow', 'msgspec', 'rich'}\n"
        "found = metadata.Distribution.discover\n"
        "metadata.Distribution.discover = lambda **kwargs: (\n"
        "    dist for dist in found(**kwargs) if dist.metadata['Name'].lower() in base\n"
        ")\n"
        "sys.modules.update(dict.fromkeys(('onnxruntime', 'openvino', 'tensorrt', 'torch', 'onnx')))\n"
        "from tandemrt.runtime.cli import main\n"
        "sys.exit(main(['doctor', *sys.argv[1:]]))\n"
    )
    run = [sys.executable, "-c", script]
    facts = json.loads(subprocess.run([*run, "--json"], capture_output=True, text=True, check=True).stdout)
    missing = {backend["backend"]: " ".join(backend["missing"]) for backend in facts["backends"]}
    assert 'pip install "tandemrt[cpu]"' in missing["onnxruntime"]
    assert 'pip install "tandemrt[openvino]"' in missing["openvino"]
    assert not facts["export"]["available"]
    assert "torch" in facts["export"]["missing"][0]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "none yet; see what is missing below" in lines


def test_doctor_sees_two_onnxruntimes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "onnxruntime_gpu-1.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.99.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (ort,) = (backend for backend in facts["backends"] if backend["backend"] == "onnxruntime")
    assert ort["targets"] == []
    assert "onnxruntime and onnxruntime-gpu overwrite each other's files: uninstall both" in ort["missing"][0]


def test_doctor_survives_a_broken_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise OSError('libonnxruntime.so: file\\ntoo short')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (ort,) = (backend for backend in facts["backends"] if backend["backend"] == "onnxruntime")
    assert ort["targets"] == []
    assert "cannot be imported (OSError: libonnxruntime.so: file too short)" in ort["missing"][0]


def test_cpuinfo_of_x86_and_arm() -> None:
    x86 = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\nflags\t: none\n"
    assert parse_cpuinfo(x86) == ("AMD EPYC", {"fpu", "avx2", "avx512_vnni"})
    arm = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd i8mm bf16\n"
    assert parse_cpuinfo(arm) == (None, {"fp", "asimd", "i8mm", "bf16"})
    assert parse_cpuinfo("") == (None, frozenset())


def test_meminfo() -> None:
    text = "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"
    assert parse_meminfo(text) == {"MemTotal": 16.0, "MemAvailable": 8.0}


@pytest.mark.parametrize(
    ("body", "devices"),
    [
        (
            "echo 'NVIDIA H200, 9.0, 570.1, 143771 MiB'",
            [{"name": "NVIDIA H200", "compute_cap": "9.0", "driver_version": "570.1", "memory_total": "143771 MiB"}],
        ),
        ("echo 'NVIDIA-SMI has failed'; exit 9", []),
        ("echo unexpected", []),
    ],
)
def test_nvidia_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, devices: list[dict[str, str]]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert nvidia_devices() == devices


def test_no_nvidia_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_devices() == []
