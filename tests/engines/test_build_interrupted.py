"""Builds that are cancelled, killed, refused or raced: the cache has a whole engine or none."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tandemrt.engines import build as builds
from tandemrt.engines import plan as plans
from tandemrt.engines import process
from tandemrt.engines.build import ensure_engine
from tandemrt.runtime.engine_files import check_engine_files, read_sidecar
from tandemrt.runtime.errors import EngineError

from .conftest import Requests
from .test_build import VERSIONS, left_in, silent


def test_a_builder_imports_nothing_from_the_working_directory(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    (tmp_path / "msgspec.py").write_text("raise SystemExit('not the one that is installed')", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert ensure_engine(request, tmp_path, silent, VERSIONS).built


def builders() -> list[int]:
    """The builder processes of this one."""
    children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text("ascii").split()
    return [int(pid) for pid in children if b"tandemrt.engines.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_cancelled_build_leaves_nothing(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("openvino:cpu", components=("unet",))

    def interrupt(label: str, done: int, total: int) -> None:
        assert len(builders()) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_engine(request, tmp_path, interrupt, VERSIONS)
    assert builders() == []
    assert left_in(tmp_path) == []


def test_a_killed_builder_is_an_error_with_a_remedy(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("openvino:cpu", components=("unet",))

    def kill(label: str, done: int, total: int) -> None:
        for pid in builders():
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(
        EngineError, match=r"was killed, as the system does when memory runs out.*The cache is as it was"
    ):
        ensure_engine(request, tmp_path, kill, VERSIONS)
    assert left_in(tmp_path) == []


@contextmanager
def limited(limit: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


def test_a_full_cache_is_an_error_with_a_remedy(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("openvino:cpu", components=("unet",))
    with limited(resource.RLIMIT_FSIZE, 4096), pytest.raises(EngineError, match=r"cannot be written.*Free some space"):
        ensure_engine(request, tmp_path, silent, VERSIONS)
    assert left_in(tmp_path) == []


def test_a_build_that_has_no_room_is_not_begun(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=900_000))
    monkeypatch.setattr(builds, "build_apart", None)
    told = r"engines: too little space: 0\.9 MB are free, and the build needs about 1\.0 MB\. Free .*\$TANDEMRT_CACHE"
    with pytest.raises(EngineError, match=told):
        ensure_engine(request, tmp_path, silent, VERSIONS)
    assert left_in(tmp_path) == []


def test_what_a_builder_says_of_a_full_disk_is_told_as_that(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    free = [10**9, 0]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free.pop(0)))
    with limited(resource.RLIMIT_FSIZE, 1024):
        with pytest.raises(EngineError, match=r"engines: too little space: 0\.0 MB are free.* Free some") as raised:
            ensure_engine(request, tmp_path, silent, VERSIONS)
        assert "ONNX Runtime cannot optimize the graph" in str(raised.value.__cause__)
        free += [10**9, 10**9]
        with pytest.raises(EngineError, match="ONNX Runtime cannot optimize the graph"):
            ensure_engine(request, tmp_path, silent, VERSIONS)
    assert left_in(tmp_path) == []


def test_a_builder_that_hears_nothing_is_stopped_all_the_same(requests: Requests, tmp_path: Path) -> None:
    """One that is held, as in native code that never looks up, ends with the cancelled build: nothing waits for it."""
    (request,) = requests("openvino:cpu", components=("unet",))
    held: list[int] = []

    def hold(label: str, done: int, total: int) -> None:
        held.extend(builders())
        os.kill(held[0], signal.SIGSTOP)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_engine(request, tmp_path, hold, VERSIONS)
    assert not Path("/proc", str(held[0])).exists()
    assert left_in(tmp_path) == []


def test_a_cache_that_cannot_be_written_serves_and_says_so(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = requests("onnxruntime:cpu", components=("unet", "unet_small"))
    built = ensure_engine(first, tmp_path, silent, VERSIONS)

    def refused(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    # The tests may run as root, whom no mode of a folder keeps out.
    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(Path, "write_bytes", refused)
    again = ensure_engine(first, tmp_path, silent, VERSIONS)
    assert (again.built, again.folder) == (False, built.folder)
    with pytest.raises(EngineError, match=r"cannot be written \(Read-only file system\).*another folder with --cache"):
        ensure_engine(second, tmp_path, silent, VERSIONS)
    assert left_in(tmp_path) == [first.key]


def test_a_cache_that_is_no_folder_is_an_error_with_a_remedy(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("openvino:cpu", components=("unet",))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EngineError, match=r"cannot be written.*another folder with --cache"):
        ensure_engine(request, tmp_path / "file", silent, VERSIONS)


def test_a_builder_that_crashes_is_an_error_with_its_log(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (request,) = requests("openvino:cpu", components=("unet",))
    monkeypatch.setattr(process, "_WORKER", "raise KeyError('none')")
    with pytest.raises(EngineError, match=r"ended without a result \(exit status 1\).*KeyError: 'none'"):
        ensure_engine(request, tmp_path, silent, VERSIONS)
    assert left_in(tmp_path) == []


def built_in_parallel(request: plans.Request, cache: Path, processes: int) -> list[int]:
    """How each of several processes ended: 1 where it built, 0 where it found what another had built."""
    children = []
    for _ in range(processes):
        pid = os.fork()
        if pid == 0:
            status = 2
            try:
                status = int(ensure_engine(request, cache, silent, VERSIONS).built)
            finally:
                os._exit(status)
        children.append(pid)
    return sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


def test_builders_of_one_key_do_the_work_once(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    assert built_in_parallel(request, tmp_path, 8) == [0] * 7 + [1]
    assert left_in(tmp_path) == [request.key]


@pytest.mark.slow
def test_kill_9_leaves_an_engine_or_none(requests: Requests, tmp_path: Path) -> None:
    from tandemrt.engines import cache as caches  # noqa: PLC0415

    (request,) = requests("onnxruntime:cpu", components=("unet",))
    began = time.monotonic()
    place = ensure_engine(request, tmp_path, silent, VERSIONS).folder
    took = time.monotonic() - began
    random = np.random.default_rng(9)
    sync, published = caches._sync, 0
    for moment in random.uniform(0, 1.1 * took, 50):
        (place / "model.onnx").unlink(missing_ok=True)  # what is there is to be replaced
        pid = os.fork()
        if pid == 0:
            try:
                # Publishing is over in a moment that a kill would hardly hit.
                caches._sync = lambda path: (time.sleep(took / 20), sync(path))[1]
                ensure_engine(request, tmp_path, silent, VERSIONS)
            finally:
                os._exit(0)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if place.exists() and (place / "model.onnx").exists():
            check_engine_files(place, read_sidecar(place))
            published += 1
    assert published < 50
    ensure_engine(request, tmp_path, silent, VERSIONS)
    check_engine_files(place, read_sidecar(place))
    (other,) = requests("onnxruntime:cpu", components=("unet_small",))
    ensure_engine(other, tmp_path, silent, VERSIONS)
    assert left_in(tmp_path) == sorted([request.key, other.key])
