"""Fresh interpreters report their marks, and their own memory rather than their parent's."""

import numpy as np
import pytest

from tandemrt.bench.starts import import_figures, run_fresh


def test_a_fresh_interpreter_reports_time_and_peak_memory_of_every_mark():
    facts = run_fresh("held = b'x' * (60 << 20)\nmark('a')\ndel held\ntime.sleep(0.05)\nmark('b')")
    assert facts["a_peak_mib"] - facts["bare_interpreter_peak_mib"] > 55
    # The kernel counts pages per thread and sums them up now and then: a peak may read a little lower later.
    assert facts["b_peak_mib"] > facts["a_peak_mib"] - 2
    assert facts["b_s"] - facts["a_s"] >= 0.05


def test_the_peak_is_the_childs_own():
    ballast = np.ones(200 << 20, np.uint8)
    facts = run_fresh("mark('start')")
    assert facts["start_peak_mib"] < ballast.nbytes / 2**20 / 2


def test_arguments_reach_the_program():
    assert run_fresh("facts['sum'] = int(sys.argv[1]) + int(sys.argv[2])", "2", "3")["sum"] == 5


def test_a_program_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)exit status 1.*ZeroDivisionError"):
        run_fresh("1 / 0")


@pytest.mark.slow
def test_imports_are_measured_for_this_runtime_and_for_diffusers():
    rows = import_figures(repeats=1)
    by_name = {row["import"]: row for row in rows}
    assert set(by_name) == {"tandemrt.runtime", "diffusers"}
    # Loading a library cannot take less than nothing, nor less memory than the bare interpreter.
    for row in rows:
        assert row["import_s"]["median"] > 0
        assert row["import_peak_mib"]["median"] >= row["bare_interpreter_peak_mib"]["median"]
