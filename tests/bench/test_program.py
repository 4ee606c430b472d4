"""Programs end with one line where their user can mend what is wrong."""

import pytest

from tandemrt.bench.program import run_program
from tandemrt.runtime.errors import ArgumentError, TandemError


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ArgumentError("--out", "exists"), "--out: exists.", 2),
        (TandemError("bundle", "broken"), "bundle: broken.", 1),
        (OSError(28, "No space left on device", "a.json"), "a.json: No space left on device", 1),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, line, status, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == status
    assert capsys.readouterr().err == line + "\n"


def test_other_errors_show_where_they_arose():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_program(main)
