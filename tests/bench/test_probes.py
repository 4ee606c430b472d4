"""What the machine tells of a contender's turn: energy, and memory on GPUs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tandemrt.bench.device_memory import DeviceMemory
from tandemrt.bench.energy import Processors
from tandemrt.bench.nvml import Gpus
from tandemrt.bench.probes import GPU_MIB, GPUS_J, PROCESSORS_J, Probes, probes_here
from tandemrt.runtime.errors import BenchmarkError

from .stand_in_nvml import Gpu, Nvml, put_in

MIB = 1 << 20
RANGE_UJ = 262_143_328_850


def write_zone(root: Path, zone: str, name: str, energy_uj: int) -> Path:
    """A zone of powercap; returns the file of its counter."""
    folder = root / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n", encoding="ascii")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n", encoding="ascii")
    (folder / "energy_uj").write_text(f"{energy_uj}\n", encoding="ascii")
    return folder / "energy_uj"


def test_packages_and_their_memory_count_and_their_parts_do_not(tmp_path: Path) -> None:
    counted = [
        write_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000),
        write_zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000),
        write_zone(tmp_path, "intel-rapl:1:0", "dram", 3_000_000),
    ]
    others = [("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")]
    left_out = [write_zone(tmp_path, zone, name, 0) for zone, name in others]
    processors = Processors(tmp_path)
    assert processors.names == ("package-0", "package-1", "dram")
    before = processors.joules()
    for file in (*counted, *left_out):
        file.write_text(str(int(file.read_text(encoding="ascii")) + 500_000), encoding="ascii")
    assert processors.joules() - before == pytest.approx(1.5)


def test_a_counter_that_begins_anew_goes_on(tmp_path: Path) -> None:
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 1_000_000)
    processors = Processors(tmp_path)
    before = processors.joules()
    file.write_text("2000000", encoding="ascii")
    assert processors.joules() - before == pytest.approx(3.0)
    file.write_text("2500000", encoding="ascii")
    assert processors.joules() - before == pytest.approx(3.5)


def test_counters_that_cannot_be_read_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandemrt.bench.probes.has_nvidia_driver", lambda: False)
    assert "has no counter of a processor's energy" in probes_here(tmp_path).told
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    file.unlink()
    file.mkdir()
    probes = probes_here(tmp_path)
    assert "energy_uj: cannot be read (Is a directory)" in probes.told
    with probes.turn(1) as seen:
        pass
    assert seen == {}


def test_a_counter_that_fails_later_is_read_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandemrt.bench.probes.has_nvidia_driver", lambda: False)
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    probes = probes_here(tmp_path)
    with probes.turn(1) as seen:
        file.unlink()
    assert seen == {}
    write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    with probes.turn(1) as seen:
        pass
    assert seen == {}
    assert "of all processors (package-0)" in probes.told and "no more after a while" in probes.told


def test_energy_of_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpu(energy_mj=1000), Gpu(energy_mj=9000)
    put_in(monkeypatch, *gpus)
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    probes = probes_here(tmp_path)
    with probes.turn(1) as seen:
        file.write_text("7000000", encoding="ascii")
        gpus[0].energy_mj, gpus[1].energy_mj = 1500, 11_000
    assert seen == {PROCESSORS_J: pytest.approx(7.0), GPUS_J: pytest.approx(2.5), GPU_MIB: 0.0}
    assert probes.told == "of all processors (package-0), of all 2 GPUs"


def test_a_gpu_without_a_counter_has_memory_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(energy_mj=None, kept={7: 3 * MIB})
    put_in(monkeypatch, gpu)
    probes = probes_here(tmp_path)
    with probes.turn(7) as seen:
        pass
    assert seen == {GPU_MIB: 3.0}
    assert "of the GPUs not told (GPUs: NVML does not tell what they take (Not Supported)" in probes.told


@pytest.mark.parametrize(("installed", "told"), [(True, "Shared Library Not Found"), (False, "is not installed")])
def test_why_gpus_are_not_told(installed: bool, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch)
    if not installed:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BenchmarkError, match=told):
        Gpus()


@pytest.mark.parametrize("tells_pids", [True, False])
def test_a_peak_is_the_contenders_own(tells_pids: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(kept={99: 100 * MIB}, tells_pids=tells_pids)
    nvml = put_in(monkeypatch, gpu)
    memory = DeviceMemory(Gpus())
    peaks = []
    for pid, most, kept in ((1, 40, 10), (2, 5, 5), (1, 20, 15)):
        with memory.turn(pid) as peak:
            gpu.kept[pid] = most * MIB
            wait_for_looks(nvml)
            gpu.kept[pid] = kept * MIB
        peaks.append(peak[0] / MIB)
    assert peaks == [40, 5, 20]


def test_a_turn_that_fails_is_over_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(tells_pids=False)
    put_in(monkeypatch, gpu)
    memory = DeviceMemory(Gpus())
    with pytest.raises(BenchmarkError), memory.turn(1):
        gpu.kept[1] = 8 * MIB
        raise BenchmarkError("contender", "failed")
    with memory.turn(1) as peak:
        pass
    assert peak == [8 * MIB]


def test_the_clock_is_that_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter((3000.0, 2900.0, 2800.0, 2000.0, None, 1000.0))
    monkeypatch.setattr("tandemrt.bench.machine.clock_mhz", lambda: next(clocks, 500.0))
    probes = Probes({})
    assert probes.clock_mhz is None
    for _ in range(6):
        with probes.turn(1):
            pass
    assert probes.clock_mhz == (2900.0, 1500.0)


def wait_for_looks(nvml: Nvml) -> None:
    """Until what is there now has been seen."""
    seen, until = nvml.looks, time.monotonic() + 10
    while nvml.looks < seen + 2 and time.monotonic() < until:
        time.sleep(0.005)
