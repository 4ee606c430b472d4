"""NVIDIA's CUDA runtime through cuda-bindings: the GPUs here, their memory, streams and graphs, errors as ours.

Nothing here is called where no driver runs: `devices()` says so first.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ExecutionError, TargetError
from ..targets import has_nvidia_driver
from .base import Array, Shape
from .buffers import one_line

_WHERE = "CUDA"
_SHOWN = "`tandemrt doctor` lists them; CUDA_VISIBLE_DEVICES limits which there are."


class Device:
    """A GPU: `architecture` such as `sm89`, and the scratch memory that engines on it share.

    index: CUDA's, which counts the GPUs that the process is shown. driver: CUDA's lower interface, needed where there
    are other GPUs. scratches: blocks for as many runs as may overlap so far; those that no run needed take nothing.
    """

    def __init__(self, runtime: Any, index: int = 0, driver: Any = None) -> None:
        self.runtime, self.index, self._driver = runtime, index, driver
        self.architecture = f"sm{self._attribute('Major')}{self._attribute('Minor')}"
        self.scratches: list[Scratch] = []
        self._reached: set[int] = set()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What NVIDIA calls it."""
        name = _called(self.runtime, "cudaGetDeviceProperties", self.index).name
        return name.decode() if isinstance(name, bytes) else str(name)

    def blocks(self, count: int) -> tuple[Scratch, ...]:
        """Scratch memory for so many runs that may overlap; whoever asks for as many has the same blocks."""
        with self._lock:
            self.scratches += [Scratch(self) for _ in range(count - len(self.scratches))]
            return tuple(self.scratches[:count])

    def reaches(self, other: Device) -> bool:
        """Whether what another GPU holds can be copied here directly; else CUDA takes it through the host's memory."""
        return bool(_called(self.runtime, "cudaDeviceCanAccessPeer", self.index, other.index))

    def reach(self, other: Device) -> None:
        """Copy from another GPU directly from now on, where that can be."""
        with self._lock:
            if other.index in self._reached:
                return
            if self.reaches(other):
                with self.current():
                    status, *_ = self.runtime.cudaDeviceEnablePeerAccess(other.index, 0)
                    if status == self.runtime.cudaError_t.cudaErrorPeerAccessAlreadyEnabled:
                        self.runtime.cudaGetLastError()  # by another library of the process; CUDA forgets the error
                    else:
                        _require(self.runtime, "cudaDeviceEnablePeerAccess", status)
            self._reached.add(other.index)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the calling thread's device for a while, as all that CUDA or TensorRT does for it needs.

        Every thread has one, CUDA's first until another is chosen, and gets it back: it is the caller's. But not where
        nothing of this process runs on it yet: `cudaSetDevice` would set it up, which takes some 100 MiB of its memory.

        Raises:
            ExecutionError: CUDA failed.
        """
        before = int(_called(self.runtime, "cudaGetDevice"))
        if before == self.index:
            yield
            return
        _called(self.runtime, "cudaSetDevice", self.index)
        try:
            yield
        finally:
            if self._is_set_up(before):
                _called(self.runtime, "cudaSetDevice", before)

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of the CUDA runtime returns beside its status, called with this device current.

        Raises:
            ExecutionError: it failed; the error and its description are named.
        """
        with self.current():
            return _called(self.runtime, function, *arguments)

    def release(self, function: str, handle: Any) -> None:
        """Free something of this device's, on whatever thread it is let go of.

        A failure is passed over: there is nothing to be done about it, and at the end of the process CUDA may be gone.
        """
        with suppress(ExecutionError):
            self.call(function, handle)

    def _is_set_up(self, index: int) -> bool:
        """Whether anything of this process runs on a GPU; to ask sets nothing up."""
        status, _, active = self._driver.cuDevicePrimaryCtxGetState(index)
        return int(status) == 0 and bool(active)

    def _attribute(self, which: str) -> int:
        kind = getattr(self.runtime.cudaDeviceAttr, f"cudaDevAttrComputeCapability{which}")
        return int(_called(self.runtime, "cudaDeviceGetAttribute", kind, self.index))


class Memory:
    """`size` bytes of a GPU's at `address`, freed with the object."""

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.size = device, size
        self.address = int(device.call("cudaMalloc", max(size, 1)))
        weakref.finalize(self, device.release, "cudaFree", self.address)


class Scratch:
    """Memory that engines use while they run and none needs afterwards: one block, as large as the largest wants.

    `lock` is held from a run's start to its end, so that no two runs use it at once.
    """

    def __init__(self, device: Device) -> None:
        self.lock = threading.Lock()
        self._device = device
        self._memory: Memory | None = None

    def reserved(self, size: int) -> Memory:
        """The block, of `size` bytes or more; another one than before where it had to grow. Call it under the lock."""
        if self._memory is None or self._memory.size < size:
            self._memory = None  # freed first: the two need not fit beside each other
            self._memory = Memory(self._device, size)
        return self._memory


class Stream:
    """A queue of work on a GPU, destroyed with the object."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.handle = int(device.call("cudaStreamCreateWithFlags", device.runtime.cudaStreamNonBlocking))
        weakref.finalize(self, device.release, "cudaStreamDestroy", self.handle)

    def upload(self, array: Array, address: int) -> None:
        """Copy a pinned array to the GPU, in the stream's order."""
        self._copy(address, array.ctypes.data, array.nbytes, "HostToDevice")

    def download(self, address: int, array: Array) -> None:
        """Copy into a pinned array from the GPU, in the stream's order."""
        self._copy(array.ctypes.data, address, array.nbytes, "DeviceToHost")

    def move(self, source: int, destination: int, size: int) -> None:
        """Copy `size` bytes within the GPU, in the stream's order."""
        self._copy(destination, source, size, "DeviceToDevice")

    def take(self, source: Memory, target: Memory, *, begin: int = 0, at: int = 0, size: int | None = None) -> None:
        """Copy what another memory holds, on whichever GPU, to one of this stream's, in its order.

        begin: the first byte that is copied. at: where it goes. size: of the bytes, by default as many as the target
        has.
        """
        own, other, size = self._device, source.device, target.size if size is None else size
        if own is other:
            self.move(source.address + begin, target.address + at, size)
            return
        own.reach(other)
        ends = target.address + at, own.index, source.address + begin, other.index
        own.call("cudaMemcpyPeerAsync", *ends, size, self.handle)

    def wait(self) -> None:
        """Return when everything queued is done."""
        self._device.call("cudaStreamSynchronize", self.handle)

    def recorded(self, work: Callable[[], None]) -> Graph:
        """What `work` queues on this stream, as a graph that can be launched; nothing of it runs now."""
        # Relaxed, since memory that is let go of meanwhile, as by a collection of garbage, is freed on this thread.
        device, mode = self._device, self._device.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        with device.current():
            device.call("cudaStreamBeginCapture", self.handle, mode)
            try:
                work()
            except BaseException:
                # Its own error would hide the first.
                _, graph = device.runtime.cudaStreamEndCapture(self.handle)
                device.runtime.cudaGetLastError()
                if graph:
                    device.release("cudaGraphDestroy", graph)
                raise
            return Graph(device, device.call("cudaStreamEndCapture", self.handle))

    def _copy(self, destination: int, source: int, size: int, direction: str) -> None:
        kind = getattr(self._device.runtime.cudaMemcpyKind, f"cudaMemcpy{direction}")
        self._device.call("cudaMemcpyAsync", destination, source, size, kind, self.handle)


class Graph:
    """Recorded work, launched as one."""

    def __init__(self, device: Device, recorded: Any) -> None:
        self._device = device
        try:
            self._executable = device.call("cudaGraphInstantiate", recorded, 0)
        finally:
            device.release("cudaGraphDestroy", recorded)
        weakref.finalize(self, device.release, "cudaGraphExecDestroy", self._executable)

    def launch(self, stream: Stream) -> None:
        """Queue all of it on a stream of its GPU; raises ExecutionError where CUDA refuses."""
        self._device.call("cudaGraphLaunch", self._executable, stream.handle)


def pinned(device: Device, shape: Shape, dtype: npt.DTypeLike) -> Array:
    """Zeros in host memory that the GPU copies from and to at full speed; freed when nothing refers to it."""
    size = prod(shape) * np.dtype(dtype).itemsize
    address = int(device.call("cudaMallocHost", max(size, 1)))
    block = (ctypes.c_byte * size).from_address(address)
    weakref.finalize(block, device.release, "cudaFreeHost", address)
    array: Array = np.frombuffer(memoryview(block), dtype).reshape(shape)
    array.fill(0)
    return array


def device(index: int = 0) -> Device:
    """The GPU of this index, in CUDA's count; the same object at every call.

    Raises:
        TargetError: as of `devices`, or there are not so many.
    """
    here = devices()
    if not 0 <= index < len(here):
        one = len(here) == 1
        expected = "0: there is 1 GPU here" if one else f"0..{len(here) - 1}: there are {len(here)} GPUs here"
        raise TargetError(_WHERE, "index of a GPU", got=index, expected=expected, remedy=_SHOWN)
    return here[index]


@functools.cache
def devices() -> tuple[Device, ...]:
    """The GPUs that CUDA shows this process; nothing is set up on them.

    Raises:
        TargetError: there is no driver or no GPU, or cuda-bindings is not installed.
    """
    remedy = "Use --target auto, or a machine with such a GPU."
    if not has_nvidia_driver():
        raise TargetError(_WHERE, "no NVIDIA driver is running here", remedy=remedy)
    try:
        from cuda.bindings import driver, runtime  # noqa: PLC0415 (of an extra)

        status, count = runtime.cudaGetDeviceCount()
    except Exception as error:  # a damaged installation fails in any way
        what = f"cuda-bindings cannot be used ({one_line(error)})"
        raise TargetError(_WHERE, what, remedy="Run `pip install cuda-bindings`.") from error
    if int(status) != 0 or not count:
        raise TargetError(_WHERE, f"no GPU can be used ({_described(runtime, status)})", remedy=remedy)
    return tuple(Device(runtime, index, driver) for index in range(count))


def _called(runtime: Any, function: str, *arguments: Any) -> Any:
    """What a function of the CUDA runtime returns beside its status, on whatever device the thread has.

    Raises:
        ExecutionError: it failed; the error and its description are named.
    """
    status, *results = getattr(runtime, function)(*arguments)
    _require(runtime, function, status)
    return results[0] if len(results) == 1 else results or None


def _require(runtime: Any, function: str, status: Any) -> None:
    """Raise ExecutionError where a function returned another status than success."""
    if int(status) != 0:
        out_of_memory = status == runtime.cudaError_t.cudaErrorMemoryAllocation
        remedy = "Ask for a smaller size or batch, or close other pipelines." if out_of_memory else ""
        raise ExecutionError(_WHERE, f"{function} failed ({_described(runtime, status)})", remedy=remedy)


def _described(runtime: Any, status: Any) -> str:
    said = runtime.cudaGetErrorString(status)[1]
    return said.decode() if isinstance(said, bytes) else str(said)
