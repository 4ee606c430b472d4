"""The distribution: what lies in the wheel, what it asks for, and that it runs beside its base packages alone."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("export", "engines", "runtime", "calibrate", "bench", "serve")
BASE = {"numpy", "tokenizers", "pillow", "msgspec", "rich"}
EXTRAS = {"cpu", "gpu", "export", "engines", "openvino", "tensorrt", "tensorrt-rtx", "bench", "nvml", "quality", "nncf"}
EXTRAS |= {"load", "serve", "ray", "dev"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist, so that what the sdist forgets is missing from the wheel too."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run_backend("build_sdist", source, work)
    shutil.unpack_archive(next(work.glob("*.tar.gz")), work / "unpacked")
    run_backend("build_wheel", next((work / "unpacked").iterdir()), work)
    return next(work.glob("*.whl"))


def run_backend(hook: str, source: Path, out: Path) -> None:
    """Call setuptools as pip would, without pip's isolated environment, which needs the network."""
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode("utf-8"))


def requirements_of(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def names_with_extra(metadata: Message, extra: str) -> set[str]:
    """Normalized names that an install with this extra asks for; "" is the base install."""
    return {
        normalized(requirement.name)
        for requirement in requirements_of(metadata)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
    }


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_wheel_holds_nothing_outside_tandemrt(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        outside = [name for name in archive.namelist() if not re.match(r"tandemrt(/|-[^/]+\.dist-info/)", name)]
    assert outside == []


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    """Fails for a package folder missing from `packages` and for data missing from `package-data`."""
    patterns = ("**/*.py", "**/py.typed", "runtime/*.schema.json", "bench/shapes/weights/**/*")
    expected = {
        f"tandemrt/{path.relative_to(ROOT).as_posix()}"
        for pattern in patterns
        for path in ROOT.glob(pattern)
        if path.is_file() and path.relative_to(ROOT).parts[0] in FOLDERS
    }
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    assert expected - shipped == set(), "list the folder in pyproject.toml: tool.setuptools.packages or package-data"
    assert {f"tandemrt/{folder}/py.typed" for folder in FOLDERS} <= shipped


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_base_install_is_the_runtime_alone(metadata: Message) -> None:
    assert names_with_extra(metadata, "") == BASE


def test_extras_are_the_documented_ones(metadata: Message) -> None:
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS


def test_only_cpu_and_gpu_bring_onnxruntime_and_never_both(metadata: Message) -> None:
    found = {extra: names_with_extra(metadata, extra) & {"onnxruntime", "onnxruntime-gpu"} for extra in EXTRAS}
    assert {extra: names for extra, names in found.items() if names} == {
        "cpu": {"onnxruntime"},
        "gpu": {"onnxruntime-gpu"},
    }


def test_bench_brings_what_the_limit_is_probed_with(metadata: Message) -> None:
    """What `tandemrt bench run` says to install is enough for it."""
    assert {"scipy", "onnx"} <= names_with_extra(metadata, "bench")


def test_licence_and_python_version(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.14"])
def test_constraints_pin_what_make_installs(metadata: Message, python_version: str) -> None:
    """Every requirement of the Makefile's extras has one pin on each Python, within the bounds of pyproject.toml."""
    made = re.search(r"^EXTRAS := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert made is not None
    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins: dict[str, list[str]] = {}
    for pin in (Requirement(line) for line in lines if not line.startswith("#")):
        if pin.marker is None or pin.marker.evaluate(environment):
            pins.setdefault(pin.name, []).append(str(pin.specifier).removeprefix("=="))
    wanted = [
        requirement
        for requirement in requirements_of(metadata)
        for extra in ("", *made[1].split(","))
        if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})
    ]
    assert {len(versions) for versions in pins.values()} == {1}
    wrong = [
        str(requirement)
        for requirement in wanted
        if not requirement.specifier.contains(pins.get(normalized(requirement.name), ["0"])[0])
    ]
    assert wrong == []


RUN_IN_BARE_ENVIRONMENT = """
import importlib, importlib.metadata, importlib.util, pkgutil, sys
sys.path[:0] = sys.argv[1:]
for absent in ("torch", "onnxruntime", "onnx", "diffusers"):
    assert importlib.util.find_spec(absent) is None, absent
import tandemrt.runtime
def fail(name):
    raise
for module in pkgutil.walk_packages(tandemrt.runtime.__path__, "tandemrt.runtime.", onerror=fail):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
(command,) = importlib.metadata.entry_points(group="console_scripts", name="tandemrt")
sys.argv = ["tandemrt", "--help"]
sys.exit(command.load()())
"""


def base_distributions() -> list[importlib.metadata.Distribution]:
    """The base packages and all that they need, as installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = sorted(BASE)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        needed = [Requirement(line) for line in found[name].requires or ()]
        pending += [
            normalized(need.name) for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return list(found.values())


def test_wheel_runs_beside_its_base_packages_alone(wheel: Path, tmp_path: Path) -> None:
    """Every runtime module imports and the command answers where nothing but the base install exists."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    packages = tmp_path / "packages"
    packages.mkdir()
    for distribution in base_distributions():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    paths = [str(tmp_path / "wheel"), str(packages)]
    command = [sys.executable, "-I", "-S", "-c", RUN_IN_BARE_ENVIRONMENT, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
