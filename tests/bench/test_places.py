"""Reports without the paths of the machine they were made on."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from tandemrt.bench.places import places_of, without_places

from .reports.sample import report

PLACES = {"/data/bundle": "BUNDLE", "/data": "HOME", "/data/cache": "CACHE"}


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("cannot read '/data/cache/engines/1.onnx'.", "cannot read 'CACHE/engines/1.onnx'."),
        ("tandemrt build-engine /data/bundle --stages 2", "tandemrt build-engine BUNDLE --stages 2"),
        ("/data/bundle: damaged. See /data/bundle.", "BUNDLE: damaged. See BUNDLE."),
        ("file:///data/bundle/unet", "file://BUNDLE/unet"),
        ("/data/bundle.making and /data/bundle-2", "HOME/bundle.making and HOME/bundle-2"),
        ("/mnt/data/bundle, ./data and ../data", "/mnt/data/bundle, ./data and ../data"),
        ("/database", "/database"),
    ],
)
def test_a_place_is_told_by_its_name(told: str, shown: str) -> None:
    given = msgspec.structs.replace(report(), caveats=(told,), request={"prompt": told})
    made = without_places(given, PLACES)
    assert (made.caveats, made.request) == ((shown,), {"prompt": shown})
    assert msgspec.structs.replace(made, caveats=given.caveats, request=given.request) == given


def test_places_are_known_by_the_paths_that_lead_to_them(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    found = places_of({"BUNDLE": tmp_path / "link", "CHECKPOINT": None, "ALL": Path("/"), "HERE": Path("some")})
    assert {path for path, name in found.items() if name == "BUNDLE"} == {
        str(tmp_path.resolve() / "bundle"),
        str(tmp_path / "link"),
    }
    assert not {"/", "some"} & set(found)
    assert (found.get(sys.prefix) == "PYTHON") is (sys.prefix != sys.base_prefix)


def test_a_machine_without_a_home_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    assert "HOME" not in places_of({}).values()
