"""What the builder knows of engines in its cache: a hit costs no hashing, and nothing that was touched is a hit."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tandemrt.engines import cache as caches
from tandemrt.engines.build import changes, ensure_engine
from tandemrt.engines.cache import cached, claimed
from tandemrt.engines.job import Job
from tandemrt.engines.plan import Request
from tandemrt.engines.tensorrt import _Timings
from tandemrt.runtime import engine_files
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import PROOF_NAME, check_engine_files, read_sidecar
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.engine_session import Loader
from tandemrt.runtime.errors import CacheError, EngineError
from tandemrt.runtime.targets import Target

from .conftest import Requests
from .test_build import VERSIONS, silent

FILE, WEIGHTS = "model.onnx", "model.onnx_data"


@pytest.fixture
def request_(requests: Requests) -> Request:
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    return request


@pytest.fixture
def folder(request_: Request, tmp_path: Path) -> Path:
    """An engine whose files are older than a step of the clock, and known to be whole."""
    place = ensure_engine(request_, tmp_path, silent, VERSIONS).folder
    time.sleep(2 * caches._CLOCK_STEP_NS / 1e9)
    assert cached(tmp_path, request_.key) is not None
    assert (place / PROOF_NAME).exists()
    return place


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are hashed."""
    names: list[str] = []
    sha256 = engine_files.file_sha256
    monkeypatch.setattr(engine_files, "file_sha256", lambda path: (names.append(path.name), sha256(path))[1])
    return names


def flip(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))


def flip_and_restore_times(path: Path) -> None:
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def replace(path: Path) -> None:
    before, other = path.stat(), path.with_name("other")
    shutil.copy2(path, other)
    flip_and_restore_times(other)
    other.replace(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def test_a_hit_hashes_nothing(
    request_: Request, folder: Path, hashed: list[str], tiny_path: Path, tmp_path: Path
) -> None:
    assert not ensure_engine(request_, tmp_path, silent, VERSIONS).built
    assert changes(request_, tmp_path) == ()
    options = ["--target", "onnxruntime:cpu", "--component", "unet", "--cache", str(tmp_path)]
    assert main(["build-engine", str(tiny_path), *options]) == 0
    assert hashed == []


def test_without_proof_a_command_hashes_once(
    folder: Path, hashed: list[str], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / PROOF_NAME).write_bytes(b'{"whole": true')
    options = ["--target", "onnxruntime:cpu", "--component", "unet", "--cache", str(tmp_path)]
    assert main(["build-engine", str(tiny_path), *options]) == 0
    assert "was in the cache" in capsys.readouterr().out
    assert hashed == [FILE, WEIGHTS]


@pytest.mark.parametrize("loose", ["", "engines", "engines/KEY"])
def test_what_others_could_have_written_to_is_no_hit(
    loose: str, request_: Request, folder: Path, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As no pipeline runs it: told with what helps, by every form of the command. Above the engines nobody looks."""
    place = tmp_path / loose.replace("KEY", request_.key)
    place.chmod(0o777)
    command = ["build-engine", str(tiny_path), "--target", "onnxruntime:cpu", "--component", "unet"]
    for options in ([], ["--explain"], ["--print-plan"]):
        assert main([*command, "--cache", str(tmp_path), *options]) == bool(loose)
        told = f"{place}: can be written by everybody, and engines are code that would run as you. Check what is in it"
        assert (f"{told}, then `chmod o-w {place}`." in capsys.readouterr().err) == bool(loose)
    place.chmod(0o755)
    assert not ensure_engine(request_, tmp_path, silent, VERSIONS).built


@pytest.mark.parametrize("harm", [flip, flip_and_restore_times, cut, replace, link, Path.unlink])
def test_what_was_touched_is_built_anew(
    harm: Callable[[Path], None], request_: Request, folder: Path, tmp_path: Path
) -> None:
    harm(folder / FILE)
    assert cached(tmp_path, request_.key) is None
    assert changes(request_, tmp_path) == (f"the engine in {folder} is damaged",)
    assert ensure_engine(request_, tmp_path, silent, VERSIONS).built
    assert cached(tmp_path, request_.key) is not None


def test_a_damaged_engine_is_hashed_once(request_: Request, folder: Path, hashed: list[str], tmp_path: Path) -> None:
    flip(folder / FILE)
    time.sleep(2 * caches._CLOCK_STEP_NS / 1e9)
    assert changes(request_, tmp_path) == (f"the engine in {folder} is damaged",)
    assert ensure_engine(request_, tmp_path, silent, VERSIONS).built
    assert hashed == [FILE]


def test_what_was_touched_a_moment_ago_is_hashed_again(
    request_: Request, folder: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "_CLOCK_STEP_NS", 1 << 62)
    assert cached(tmp_path, request_.key) is not None
    assert cached(tmp_path, request_.key) is not None
    assert hashed == [FILE, WEIGHTS] * 2


def test_damage_that_loading_finds_is_repaired_by_the_next_build(
    request_: Request, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk may rot: the content is another, and nothing else tells."""
    flip(folder / FILE)
    whole = caches._Proof(whole=True, files={})
    monkeypatch.setattr(caches, "_stamps", lambda *_: {})
    caches._write_proof(folder, whole)
    assert not ensure_engine(request_, tmp_path, silent, VERSIONS).built
    with pytest.raises(EngineError, match=r"sha256, got .*Build the engine again with `tandemrt build-engine`\."):
        check_engine_files(folder, read_sidecar(folder))
    assert ensure_engine(request_, tmp_path, silent, VERSIONS).built
    check_engine_files(folder, read_sidecar(folder))


def test_a_whole_engine_is_hashed_when_it_is_loaded(
    tiny: Bundle, folder: Path, hashed: list[str], tmp_path: Path
) -> None:
    (found,) = fitting_engines(tiny, "unet", Target("onnxruntime", "cpu"), cache=tmp_path)
    Loader(tiny, "unet", Target("onnxruntime", "cpu"), cache=tmp_path).engine(found)
    assert hashed == [FILE, WEIGHTS]


def test_a_lock_that_cannot_be_removed_is_let_go(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".lock":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    opened = len([*Path("/proc/self/fd").iterdir()])
    with caches.claimed(tmp_path, request_.key, silent) as claim:
        lock = claim.lock
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(lock)
    caches._sweep(engines_folder(tmp_path))
    assert len([*Path("/proc/self/fd").iterdir()]) == opened
    monkeypatch.undo()
    caches._sweep(engines_folder(tmp_path))
    assert list(engines_folder(tmp_path).iterdir()) == []


def test_what_a_killed_builder_leaves_of_timings_is_swept(request_: Request, tmp_path: Path) -> None:
    """What TensorRT measured is written where the next run sweeps, and then moved to where it is kept."""
    timings = tmp_path / "timings" / "tensorrt.bin"
    with caches.claimed(tmp_path, request_.key, silent) as claim:
        job = Job(
            component="unet", model="", folder=str(claim.part), backend="tensorrt", device="sm90", precision="fp16",
            profiles=(), flags={}, timings=str(timings),
        )  # fmt: skip
        there: list[list[str]] = []

        def serialize() -> memoryview:
            return memoryview(b"measured")

        def sync(_: int) -> None:
            there.append([path.name for path in timings.parent.iterdir()])
            assert [path.suffix for path in claim.part.iterdir()] == [".part"]

        cache = SimpleNamespace(serialize=serialize)
        config = SimpleNamespace(create_timing_cache=lambda known: cache, set_timing_cache=lambda *_: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            _Timings(config, job).save()
        assert there == [[]]
        assert list(claim.part.iterdir()) == []
    assert timings.read_bytes() == b"measured"


@pytest.mark.parametrize(
    ("code", "where", "of_the_cache"),
    [
        (errno.ENOENT, "bundle/unet/model.onnx", False),
        (errno.ENOSPC, "bundle/unet/model.onnx", True),  # a copy's error may name what is copied
        (errno.EROFS, "engines/x", True),
        (errno.EIO, None, True),
    ],
)
def test_a_refused_file_that_is_not_the_caches_is_no_fault_of_the_cache(
    code: int, where: str | None, of_the_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match=os.strerror(code)) as raised, claimed(Path(), "0" * 64, silent):
        raise OSError(code, os.strerror(code), where)
    assert isinstance(raised.value, CacheError) is of_the_cache
