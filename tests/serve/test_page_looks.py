"""The page for everybody: names for those who do not see it, room on a phone, contrast."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from .browsing import Open, described, expect, painted


def test_every_control_has_a_role_and_a_name(opened: Open, client: httpx.Client) -> None:
    tab = painted(described(opened(client)))
    named = {
        "textbox": ["Prompt", "Negative prompt may be empty"],
        "combobox": ["First on", "Then on", "Preview every"],
        "spinbutton": ["Steps of the first", "Steps of the second", "Guidance", "Seed"],
        "button": ["Paint", "Keep this seed"],
        "link": ["Download picture", "Download data"],
        "progressbar": ["Steps painted"],
        "table": ["Where the time went"],
        "group": ["Steps"],
        "form": ["What to paint"],
        "region": ["Picture"],
    }
    for role, names in named.items():
        for name in names:
            expect(tab.get_by_role(role, name=name, exact=True)).to_be_visible()
    assert tab.locator("input, select, textarea").evaluate_all("all => all.filter(one => !one.labels.length)") == []
    tab.get_by_role("button", name="Keep this seed").click()
    assert tab.get_by_label("Seed").input_value() in tab.get_by_role("status").text_content()
    tab.get_by_text("How it was painted").click()
    expect(tab.get_by_role("definition").filter(has_text="a red circle left of a blue square")).to_be_visible()


def fits(tab: Any) -> bool:
    return bool(tab.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_a_phone_and_enlarged_text(opened: Open, device: httpx.Client) -> None:
    tab = described(opened(device, 390, 844, reduced_motion="reduce"))
    assert fits(tab)
    expect(tab.locator("#frame")).not_to_be_in_viewport(ratio=0.9)
    painted(tab)
    assert fits(tab)
    expect(tab.locator("#frame")).to_be_in_viewport(ratio=0.9)
    tab.get_by_text("How it was painted").click()
    for width in (320, 600):  # 1280 px at 400%, 1200 px at 200%
        tab.set_viewport_size({"width": width, "height": 450})
        assert fits(tab)
    tab.add_style_tag(content="html { font-size: 200% }")
    tab.set_viewport_size({"width": 1200, "height": 900})
    assert fits(tab)
    tab.evaluate("document.getElementById('state').className = 'away'")
    assert tab.locator("#state").evaluate("one => getComputedStyle(one, '::before').animationName") == "none"


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance, of `#rgb` or `#rrggbb`."""
    digits = colour.strip().removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(digit * 2 for digit in digits)
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough(opened: Open, client: httpx.Client, scheme: str) -> None:
    tab = opened(client, color_scheme=scheme)
    read = "name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`)"
    texts = ["ink paper", "ink card", "soft paper", "soft card", "accent card", "on-accent accent", "bad card",
             "warn warned"]  # fmt: skip
    for least, pairs in ((4.5, texts), (3.0, ["edge card", "first card", "second card", "accent line"])):
        for pair in pairs:
            dark, light = sorted(luminance(tab.evaluate(read, name)) for name in pair.split())
            assert (light + 0.05) / (dark + 0.05) >= least, pair
