"""How the programs run by `python -m tandemrt.bench…` end."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tandemrt.runtime.errors import TandemError


def run_program(main: Callable[[], None]) -> None:
    """Call `main`; an error that its user can mend ends as one line on stderr, with the exit status of the commands."""
    try:
        main()
    except TandemError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_status)
    except OSError as error:
        sys.stderr.write(f"{error.filename or 'file'}: {error.strerror or error}\n")
        sys.exit(1)
