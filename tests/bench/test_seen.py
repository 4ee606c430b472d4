"""Energy and memory on GPUs in the sections of a report."""

from __future__ import annotations

from tandemrt.bench.contenders import Answer
from tandemrt.bench.probes import GPU_MIB, GPUS_J, PROCESSORS_J
from tandemrt.bench.reports.schema import Section
from tandemrt.bench.rounds import Taken
from tandemrt.bench.sections import pictures_section, variants_section
from tandemrt.bench.seen import NOTE

TIMES = {"total_s": 3.0, "text_s": 1.0, "decode_s": 1.0, "peak_mib": 9.0}


def taken(*rounds: dict[str, float]) -> Taken:
    """Rounds that told these figures besides their times."""
    return Taken(rounds=[Answer({**TIMES, **one}, {}) for one in rounds])


def columns(section: Section) -> set[str]:
    return {column.of for column in section.columns}


def test_what_every_round_told_is_shown() -> None:
    both = {
        "a": taken({PROCESSORS_J: 5.0, GPU_MIB: 7.0, GPUS_J: 1.0}, {PROCESSORS_J: 6.0, GPU_MIB: 6.0}),
        "b": taken({}, {}),
    }
    section = pictures_section(both, 1, {})
    a, b = (row.figures for row in section.rows)
    assert (a[PROCESSORS_J].samples, a[GPU_MIB].samples) == ((5.0, 6.0), (7.0,))
    assert GPUS_J not in a and not {PROCESSORS_J, GPU_MIB} & set(b)
    assert {PROCESSORS_J, GPU_MIB} <= columns(section) and GPUS_J not in columns(section)
    assert section.note.endswith(NOTE)


def test_a_machine_that_tells_nothing_has_no_columns() -> None:
    section = pictures_section({"a": taken({}, {})}, 1, {})
    assert not {PROCESSORS_J, GPUS_J, GPU_MIB} & columns(section)
    assert not section.note.endswith(NOTE)


def test_ways_of_one_process_have_energy_and_no_memory_of_their_own() -> None:
    section = variants_section("cfg", "Guidance", {"batched": taken({GPUS_J: 2.0, GPU_MIB: 7.0})}, "")
    assert GPUS_J in columns(section) and GPU_MIB not in columns(section)
    assert GPU_MIB not in section.rows[0].figures
