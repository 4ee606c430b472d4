"""How tests of the page use a browser; without Playwright they are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from ..lacking import lacking

if find_spec("playwright") is None:
    lacking("Playwright")
from playwright import sync_api

expect = sync_api.expect
# None for Playwright's own.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
