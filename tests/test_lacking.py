"""Tests that need what a machine lacks are skipped, but where all has to be there."""

from __future__ import annotations

import pytest

from .lacking import lacking


def test_what_is_lacking_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEMRT_COMPLETE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="there is no browser"):
        lacking("browser")
    monkeypatch.setenv("TANDEMRT_COMPLETE", "1")
    with pytest.raises(pytest.fail.Exception, match="there is no browser"):
        lacking("browser")
