"""GPUs in the host's memory: a CUDA runtime and a TensorRT that compute, and note whatever is done on the wrong one.

An engine of theirs is an ONNX graph, which ONNX Runtime runs on the buffers the context was given. What is queued on a
stream is done as late as CUDA may do it, when that stream is waited for: who does not wait finds what was there before.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tandemrt.runtime import targets
from tandemrt.runtime.backends import cuda, tensorrt

SCRATCH_BYTES = 16
ALREADY_ENABLED = 704


@dataclass(eq=False)
class Ran:
    """A call of an engine: on which GPU, by the names of its outputs, and what it was given."""

    gpu: int
    outputs: tuple[str, ...]
    given: Mapping[str, np.ndarray]


@dataclass
class Gpus:
    """GPUs of these architectures.

    wrong: what was done on another GPU than it belongs to, or to what is not there, which is an error besides, or too
    early. ran: the calls of engines. set_up: the GPUs that anything was made on, or that a thread was moved to. loaded:
    the GPU of each engine that was loaded. peers: whether they can reach each other's memory. copies: each one's kind
    and bytes.
    allocated: how many blocks were, on GPUs and pinned, also those that were freed since. recorded, launched: how many
    graphs were, of the latter each time.
    """

    architectures: Sequence[str]
    wrong: list[str] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)
    set_up: set[int] = field(default_factory=set)
    loaded: list[int] = field(default_factory=list)
    peers: bool = True
    copies: list[tuple[str, int]] = field(default_factory=list)
    allocated: int = 0
    recorded: int = 0
    launched: int = 0

    def __post_init__(self) -> None:
        self._thread, self._names = threading.local(), count(1)
        self._owners: dict[int, int] = {}
        self._blocks: dict[int, Any] = {}
        self._reaching: set[tuple[int, int]] = set()
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._recording: dict[int, list[Callable[[], None]]] = {}
        self._queued: defaultdict[int, deque[Callable[[], None]]] = defaultdict(deque)

    @property
    def current(self) -> int:
        """The calling thread's."""
        return int(getattr(self._thread, "gpu", 0))

    @current.setter
    def current(self, gpu: int) -> None:
        self._thread.gpu = gpu
        self.set_up.add(gpu)

    def state(self, gpu: int) -> tuple[int, int, bool]:
        """What the driver says of a GPU: whether it is set up, last."""
        return 0, 0, gpu in self.set_up

    def owned(self) -> dict[int, int]:
        """The sizes of what is still allocated, each with how many there are; 0 for streams and graphs."""
        return dict(Counter(len(self._blocks.get(thing, ())) for thing in self._owners))

    @property
    def copied(self) -> Counter[str]:
        """The bytes of each kind of copy."""
        total: Counter[str] = Counter()
        for kind, size in self.copies:
            total[kind] += size
        return total

    def holds(self, thing: int) -> bool:
        """Whether memory at an address, or what a handle names, is there."""
        return thing in self._owners

    def block_of(self, address: int, size: int) -> int:
        """Where the block begins that so many bytes lie in; the address itself where there is none."""
        blocks = self._blocks.copy()  # one step, where other threads and the collector's finalizers may free meanwhile
        inside = (one for one, block in blocks.items() if one <= address and address + size <= one + len(block))
        return next(inside, address)

    def require(self, what: str, *things: int) -> None:
        """Note where something is not there, by its address or handle, and raise: to touch it would be a crash."""
        for thing in things:
            if not self.holds(thing):
                self.wrong.append(f"{what} of what is not there, or was freed")
                raise AssertionError(self.wrong[-1])

    def check(self, what: str, *things: int) -> None:
        """As `require`; and note where a thing is another GPU's than the thread's."""
        self.require(what, *things)
        for thing in things:
            self.check_current(what, self._owners[thing])

    def check_current(self, what: str, gpu: int) -> None:
        """Note where something is done on another GPU than the thread's."""
        if gpu != self.current:
            self.wrong.append(f"{what} of GPU {gpu} with GPU {self.current} current")

    def made(self, thing: int) -> tuple[int, int]:
        self.set_up.add(self.current)
        self._owners[thing] = self.current
        return 0, thing

    def queue(self, what: str, stream: int, work: Callable[[], None]) -> None:
        """Have work done on a stream when it is waited for, or whenever what it records is launched."""
        self.check(what, stream)
        self._recording.get(stream, self._queued[stream]).append(work)

    def _waited(self, stream: int) -> tuple[int]:
        self.check("StreamSynchronize", stream)
        while self._queued[stream]:
            self._queued[stream].popleft()()
        return (0,)

    def _allocated(self, size: int) -> tuple[int, int]:
        block = (ctypes.c_byte * size)()
        ctypes.memset(block, 0xFF, size)  # as real memory it holds anything at first, here NaN
        self._blocks[ctypes.addressof(block)] = block
        self.allocated += 1
        return self.made(ctypes.addressof(block))

    def _copied(self, target: int, source: int, size: int, kind: str, stream: int) -> tuple[int]:
        blocks = self.block_of(target, size), self.block_of(source, size)
        ends = {"DeviceToHost": blocks[1:], "HostToDevice": blocks[:1]}.get(kind, blocks)
        self.require(kind, *blocks)
        self.check(kind, *ends)
        self.queue(kind, stream, lambda: self._moved(kind, target, source, size))
        return (0,)

    def _moved(self, kind: str, target: int, source: int, size: int) -> None:
        self.require(kind, self.block_of(target, size), self.block_of(source, size))
        self.copies.append((kind, size))
        ctypes.memmove(target, source, size)

    def _taken(self, *arguments: int) -> tuple[int]:
        target, gpu, source, other, size, stream = arguments
        kind = "direct" if (gpu, other) in self._reaching else "staged"
        blocks = self.block_of(target, size), self.block_of(source, size)
        self.require("MemcpyPeerAsync", blocks[1])
        self.check("MemcpyPeerAsync", blocks[0])
        owners = tuple(self._owners[block] for block in blocks)
        if owners != (gpu, other):
            self.wrong.append(f"a copy from GPU {owners[1]} to {owners[0]} as {other} to {gpu}")
        self.queue(kind, stream, lambda: self._moved(kind, target, source, size))
        return (0,)

    def _enabled(self, other: int, _: int) -> tuple[int]:
        if (self.current, other) in self._reaching:
            return (ALREADY_ENABLED,)
        self._reaching.add((self.current, other))
        return (0,)

    def _freed(self, what: str) -> Callable[[int], tuple[int]]:
        def free(thing: int) -> tuple[int]:
            self.check(what, thing)
            if self._queued.pop(thing, ()):
                self.wrong.append(f"{what} of what nobody waited for")
            del self._owners[thing]
            self._blocks.pop(thing, None)
            self._graphs.pop(thing, None)
            return (0,)

        return free

    def _begun(self, stream: int, _: object) -> tuple[int]:
        self.check("StreamBeginCapture", stream)
        self._recording[stream] = []
        return (0,)

    def _ended(self, stream: int) -> tuple[int, int]:
        self.check("StreamEndCapture", stream)
        graph = next(self._names)
        self._graphs[graph] = self._recording.pop(stream)
        self.recorded += 1
        return self.made(graph)

    def _instantiated(self, graph: int, _: int) -> tuple[int, int]:
        self.check("GraphInstantiate", graph)
        made = next(self._names)
        self._graphs[made] = self._graphs[graph]
        return self.made(made)

    def _launched(self, graph: int, stream: int) -> tuple[int]:
        self.check("GraphLaunch", graph, stream)
        self.launched += 1
        for work in self._graphs[graph]:
            self.queue("GraphLaunch", stream, work)
        return (0,)

    def _attribute(self, which: str, gpu: int) -> tuple[int, int]:
        digits = self.architectures[gpu].removeprefix("sm")
        return 0, int(digits[:-1] if which == "Major" else digits[-1])

    def _set(self, gpu: int) -> tuple[int]:
        self.current = gpu
        return (0,)

    @property
    def runtime(self) -> Any:
        """What stands for CUDA's runtime."""
        functions: dict[str, Callable[..., Any]] = {
            "GetDevice": lambda: (0, self.current),
            "SetDevice": self._set,
            "GetDeviceProperties": lambda gpu: (0, SimpleNamespace(name=f"Stand-in {gpu}".encode())),
            "DeviceGetAttribute": self._attribute,
            "Malloc": self._allocated,
            "MallocHost": self._allocated,
            "StreamCreateWithFlags": lambda _: self.made(next(self._names)),
            "StreamSynchronize": self._waited,
            "StreamBeginCapture": self._begun,
            "StreamEndCapture": self._ended,
            "MemcpyAsync": self._copied,
            "MemcpyPeerAsync": self._taken,
            "DeviceCanAccessPeer": lambda *_: (0, int(self.peers)),
            "DeviceEnablePeerAccess": self._enabled,
            "GetLastError": lambda: (0,),
            "GetErrorString": lambda status: (0, f"error {status}".encode()),
            "GraphInstantiate": self._instantiated,
            "GraphLaunch": self._launched,
        }
        for name in ("Free", "FreeHost", "StreamDestroy", "GraphDestroy", "GraphExecDestroy"):
            functions[name] = self._freed(name)
        directions = ("HostToDevice", "DeviceToHost", "DeviceToDevice")
        kinds = {
            "DeviceAttr": {f"cudaDevAttrComputeCapability{name}": name for name in ("Major", "Minor")},
            "MemcpyKind": {f"cudaMemcpy{name}": name for name in directions},
            "StreamCaptureMode": {"cudaStreamCaptureModeRelaxed": 1},
            "Error_t": {"cudaErrorPeerAccessAlreadyEnabled": ALREADY_ENABLED, "cudaErrorMemoryAllocation": 2},
        }
        named = {name: SimpleNamespace(**values) for name, values in kinds.items()}
        everything = {**functions, **named, "StreamNonBlocking": 1}
        return SimpleNamespace(**{f"cuda{name}": value for name, value in everything.items()})

    @property
    def flavour(self) -> Any:
        """What stands for TensorRT."""
        strategy = SimpleNamespace(USER_MANAGED=2)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda graph: _Engine(self, graph))
        logger = type("ILogger", (), {"ERROR": 1})
        return SimpleNamespace(
            ILogger=logger, Runtime=lambda _: runtime, Refitter=None, ExecutionContextAllocationStrategy=strategy
        )


class _Engine:
    def __init__(self, gpus: Gpus, graph: bytes) -> None:
        self.gpus, self.gpu = gpus, gpus.current
        gpus.set_up.add(self.gpu)
        gpus.loaded.append(self.gpu)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.types = {one.name: one.type for one in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.types)

    def __del__(self) -> None:
        self.gpus.check_current("an engine is destroyed", self.gpu)

    def get_tensor_name(self, index: int) -> str:
        return tuple(self.types)[index]

    def create_execution_context(self, _: object) -> _Context:
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine, self._gpus = engine, engine.gpus
        self._inputs: dict[str, np.ndarray] = {}
        self._outputs: dict[str, np.ndarray] = {}
        self._addresses: dict[str, int] = {}
        self._profiled = False
        self._check("create_execution_context")

    def __del__(self) -> None:
        self._gpus.check_current("a context is destroyed", self._engine.gpu)

    def _check(self, what: str, *things: int) -> bool:
        self._gpus.check_current(what, self._engine.gpu)
        self._gpus.check(what, *things)
        return True

    def set_optimization_profile_async(self, _: int, stream: int) -> bool:
        self._check("set_optimization_profile_async", stream)
        self._gpus.queue("set_optimization_profile_async", stream, self._take_profile)
        return True

    def _take_profile(self) -> None:
        self._profiled = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        dtype = {"tensor(int64)": np.int64}.get(self._engine.types[name], np.float32)
        self._inputs[name] = np.zeros(shape, dtype)
        return self._check("set_input_shape")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._inputs:
            return self._inputs[name].shape
        if not self._outputs:
            self._outputs = self._computed()
        return self._outputs[name].shape

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH_BYTES

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= SCRATCH_BYTES
        self._check("set_device_memory", address)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return self._check("set_tensor_address", address)

    def execute_async_v3(self, stream: int) -> bool:
        self._check("execute_async_v3", stream)
        self._gpus.queue("execute_async_v3", stream, self._run)
        return True

    def _run(self) -> None:
        self._gpus.require("execute_async_v3", *self._addresses.values())
        if not self._profiled:
            self._gpus.wrong.append("an engine runs before it has its profile")
        for name, array in self._inputs.items():
            ctypes.memmove(array.ctypes.data, self._addresses[name], array.nbytes)
        made = self._computed()
        for name, array in made.items():
            ctypes.memmove(self._addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        given = {name: array.copy() for name, array in self._inputs.items()}
        self._gpus.ran.append(Ran(self._engine.gpu, tuple(made), given))

    def _computed(self) -> dict[str, np.ndarray]:
        names = [one.name for one in self._engine.session.get_outputs()]
        return dict(zip(names, self._engine.session.run(names, self._inputs), strict=True))


def stand_in(monkeypatch: pytest.MonkeyPatch, *architectures: str) -> Gpus:
    """GPUs of these architectures, which all that runs on GPUs finds until the test ends."""
    gpus = Gpus(architectures)
    runtime, driver = gpus.runtime, SimpleNamespace(cuDevicePrimaryCtxGetState=gpus.state)
    here = tuple(cuda.Device(runtime, index, driver) for index in range(len(architectures)))
    monkeypatch.setattr(targets, "_NVIDIA_DEVICES", (Path("/"),))
    monkeypatch.setattr(cuda, "devices", lambda: here)
    monkeypatch.setattr(tensorrt, "imported", lambda _: gpus.flavour)
    return gpus
