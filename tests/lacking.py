"""What tests need of a machine besides what pip brings, and that machine may lack."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(what: str) -> NoReturn:
    """Skip this test, or this module's; where TANDEMRT_COMPLETE is set they fail.

    what: is not there.
    """
    told = f"there is no {what}"
    if "TANDEMRT_COMPLETE" in os.environ:
        pytest.fail(told, pytrace=False)
    pytest.skip(told, allow_module_level=True)
