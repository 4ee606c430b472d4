"""How tests of the page use a browser; without Playwright they are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import COMPLETE

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with Playwright")
expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Where all has to be there Playwright takes its own browser, or fails.
needs_browser = pytest.mark.skipif(CHROMIUM is None and not COMPLETE, reason="no Chromium is on the PATH")
# What the page said and showed on the way, which is gone before a test can look.
RECORDED = """() => {
  window.told = [];
  const seen = {state: "textContent", live: "textContent", picture: "alt"};
  for (const [id, what] of Object.entries(seen)) {
    const one = document.getElementById(id);
    new MutationObserver(() => window.told.push(`${id}: ${one[what]}`))
      .observe(one, {childList: true, characterData: true, subtree: true, attributeFilter: ["alt"]});
  }
}"""
Open = Callable[..., Any]


def described(tab: Any) -> Any:
    expect(tab.locator("#model")).to_have_text("bundle on onnxruntime:cpu")
    return tab


def painted(tab: Any) -> Any:
    """Paint, and wait until it is done."""
    tab.get_by_role("button", name="Paint").click()
    expect(tab.get_by_role("status")).to_contain_text("Painted in ")
    return tab
