"""TensorRT engines, of either flavour: strongly typed, so that every layer computes in the type its graph states."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..runtime.backends.modules import imported
from ..runtime.engine_files import REFIT, VERSION_COMPATIBLE, Layer
from ..runtime.errors import EngineError
from ..runtime.files import write_whole
from ..runtime.targets import PORTABLE
from .flavour import capabilities
from .job import Built, Job, Progress

ENGINE_NAME = "engine.plan"
PROGRESS_INTERVAL_S = 0.2
# What builders tell at INFO of each profile, and at VERBOSE of each layer (TensorRT-RTX 1.7).
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: ")
_OUTPUTS = re.compile(r"Outputs: \[.*?Datatype: (?P<type>\w+)")
_METADATA = re.compile(r"Metadata: (?P<nodes>.*)$")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def build(job: Job, progress: Progress) -> Built:
    """Build an engine with all of the job's profiles for all of its architectures.

    Raises:
        ArgumentError: the flavour does not know an architecture.
        TargetError: it is missing.
        EngineError: the graph cannot be parsed or built; the builder's words are in it.
    """
    trt = imported(job.backend)
    log = _log(trt)
    try:
        builder = trt.Builder(log)
    except Exception as error:  # pybind raises TypeError when the library refuses
        raise _failed(job, "the builder cannot be made", log) from error
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job.model):
        refused = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise EngineError(job.component, f"{job.backend} cannot parse the graph ({refused[:800]})")
    config = _configured(trt, builder, job, _monitor(trt, job.component, progress))
    timings = _Timings(config, job)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failed(job, "the build failed", log)
    timings.save()
    with Path(job.folder, ENGINE_NAME).open("wb") as stream:
        stream.write(memoryview(plan))
    return Built(
        files=(ENGINE_NAME,),
        layers=tuple(log.layers),
        profile_memory_bytes=tuple(log.activations) if len(log.activations) == len(job.profiles) else (),
        versions={job.backend: trt.__version__},
    )


class _Timings:
    """What the builder has measured of kernels on this GPU, in a file that later builds begin with; none without one.

    TensorRT for RTX measures nothing, and refuses such a cache where there is no GPU.
    """

    def __init__(self, config: Any, job: Job) -> None:
        self._path = None if job.timings is None else Path(job.timings)
        self._within = Path(job.folder)
        if self._path is None:
            return
        known = b""
        with suppress(OSError):
            known = self._path.read_bytes()
        # TensorRT checks that they were measured here, and goes without where they were not.
        self._cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
        config.set_timing_cache(self._cache, False)

    def save(self) -> None:
        """Write what is known now; a cache that cannot be written costs the next build its time, nothing else."""
        if self._path is not None:
            made = bytes(self._cache.serialize())
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_whole(self._path, lambda stream: stream.write(made), within=self._within)


def _network_flags(trt: Any) -> int:
    """Strong typing where it is a choice: from TensorRT 11 on it is the only way."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configured(trt: Any, builder: Any, job: Job, monitor: Any) -> Any:
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # On by default, it rounds the factors of fp32 products to 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    for ranges in job.profiles:
        profile = builder.create_optimization_profile()
        for name, one in ranges.items():
            profile.set_shape(name, one.min, one.opt, one.max)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(job.component, f"{job.backend} refuses the profile", got=str(ranges))
    if job.flags.get(REFIT):
        config.set_flag(trt.BuilderFlag.REFIT)
    if job.flags.get(VERSION_COMPATIBLE):
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if job.backend == "tensorrt":
        if job.device == PORTABLE:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        return config
    wanted = capabilities(trt, job.backend, job.device)
    if wanted:
        config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        config.set_compute_capability(capability, index)
    return config


def layer_of(message: str) -> Layer | None:
    """The layer that a line of the builder's describes, None where it describes none."""
    found = _LAYER.match(message)
    if found is None:
        return None
    typed, described = _OUTPUTS.search(message), _METADATA.search(message)
    nodes = _NODE.findall(described["nodes"]) if described else []
    return Layer(
        name=found["name"],
        kind=found["kind"],
        precision=typed["type"].lower() if typed else "",
        nodes=tuple(dict.fromkeys(nodes)),
    )


def _log(trt: Any) -> Any:
    """A logger of the flavour that keeps what the sidecar tells; warnings and errors go to stderr too.

    The class is made here, since its base comes with the flavour.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.layers: list[Layer] = []
            self.activations: list[int] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            if severity <= trt.ILogger.WARNING:
                print(message, flush=True)
            elif severity == trt.ILogger.INFO:
                self.activations += map(int, _ACTIVATIONS.findall(message))
            else:
                self.layers += _layers_in(message)

    return Log()


def _layers_in(message: str) -> Iterator[Layer]:
    # Builders print tens of thousands of other lines at this level.
    if "LayerType: " in message:
        for line in message.splitlines():
            layer = layer_of(line)
            if layer is not None:
                yield layer


def _monitor(trt: Any, component: str, progress: Progress) -> Any:
    """The builder's monitor that passes its phases on to `progress`; what that raises ends the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._spoke_s = 0.0
            self._stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if not self._stopped and now - self._spoke_s >= PROGRESS_INTERVAL_S:
                self._spoke_s = now
                try:
                    progress(f"{component}: {phase_name}", step, self._steps.get(phase_name, 0))
                except OSError:  # nobody listens any more
                    self._stopped = True
            return not self._stopped

    return Monitor()


def _failed(job: Job, what: str, log: Any) -> EngineError:
    told = "; ".join(" ".join(line.split())[:400] for line in log.errors[-3:])
    wants_memory = re.search(r"memory|\balloc", told, re.IGNORECASE)
    remedy = "Free memory, or build for fewer architectures or a narrower profile." if wants_memory else ""
    return EngineError(job.component, f"{job.backend}: {what} ({told or 'it did not say why'})", remedy=remedy)
