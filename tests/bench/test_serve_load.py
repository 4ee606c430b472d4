"""Servers under load: what users ask for is what servers answer, and what is told of it is what was seen."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tandemrt.bench import serve_load
from tandemrt.bench.locust_users import GENERATIONS, HANDOFF, PNG, outcome_of
from tandemrt.bench.serve_load import (
    answers_figures,
    main,
    memory_figures,
    parts_figures,
    plan_of,
    server_facts,
    watched,
)
from tandemrt.runtime import Handover, Pipeline
from tandemrt.runtime.errors import ArgumentError, BenchmarkError

from ..lacking import lacking
from ..runtime.tiny_bundle import write_tiny_bundle
from ..serve.asking import TOKEN
from ..serve.conftest import serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    bundle = tmp_path_factory.mktemp("loaded") / "bundle"
    write_tiny_bundle(bundle)
    with Pipeline.open(bundle, threads=1) as pipe, serving(pipe, token=TOKEN) as client:
        yield client


@pytest.fixture
def arguments(server: httpx.Client, tmp_path: Path) -> list[str]:
    """Of the program, for this server."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return [str(server.base_url), "--token-file", str(tmp_path / "token"), "--json", str(tmp_path / "load.json")]


def asked_in_turn(job: Mapping[str, Any]) -> list[tuple[float, float, str, str, int]]:
    """As `seen_by_users`, by one user who asks four times, and by one whose answer comes after the end."""
    seen = [(job["seconds"] + 0.1, 1.0, HANDOFF, "ok", 5)]
    with httpx.Client(base_url=job["url"], headers={"authorization": f"Bearer {job['token']}"}) as client:
        for number, path in enumerate([HANDOFF, HANDOFF, GENERATIONS, HANDOFF]):
            asked = {**job["asked"][path], "seed": number}
            answer = client.post(path, json=asked, timeout=30)
            outcome = outcome_of(path, asked, answer.status_code, answer.content)
            seen.append((number * 0.5, answer.elapsed.total_seconds() * 1e3, path, outcome, len(answer.content)))
    return seen


def test_what_is_asked_for_is_answered(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_load, "seen_by_users", asked_in_turn)
    monkeypatch.setattr(serve_load.metadata, "version", lambda _: "2")
    own = str(os.getpid())
    main([*arguments, "--pid", f"first:unet={own}", own, "--users", "1", "--seconds", "2"])
    facts = json.loads((tmp_path / "load.json").read_text())
    assert facts["by_kind"]["hand-over"]["outcomes"] == {"ok": 3}
    assert facts["by_kind"]["picture"]["outcomes"] == {"ok": 1}
    assert facts["by_kind"]["both"]["good_per_s"] == 2
    assert [part["outcomes"] for part in facts["by_minute"]] == [{"ok": 4}]
    assert facts["server"]["model"] == "bundle"
    assert len(facts["asked"][HANDOFF]["plan"]) == 64
    assert facts["asked"][HANDOFF] | {"prompt": "", "plan": ""} == {
        "prompt": "", "steps": [["unet", 4]], "until": 2, "width": 64, "height": 64, "plan": ""
    }  # fmt: skip
    assert [one["process"] for one in facts["memory"]] == ["first:unet", ""]
    assert facts["memory"][0]["begins_mib"] > 1
    assert TOKEN not in (tmp_path / "load.json").read_text()
    table = capsys.readouterr().out
    assert table.strip() == (tmp_path / "load.md").read_text().strip()
    assert "| hand-over | 3 | 1.50 |" in table
    assert "| first:unet | " in table
    assert "| 2 | " in table
    assert "1 users for 2 s, without pauses but where they were told to wait; bundle on onnxruntime:cpu" in table


def test_the_token_may_be_in_the_environment(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _, _, *others = arguments
    monkeypatch.setattr(serve_load, "seen_by_users", asked_in_turn)
    monkeypatch.setattr(serve_load.metadata, "version", lambda _: "2")
    monkeypatch.delenv("TANDEMRT_TOKEN", raising=False)
    with pytest.raises(BenchmarkError, match="HTTP Error 401"):
        main([url, *others, "--seconds", "2"])
    monkeypatch.setenv("TANDEMRT_TOKEN", TOKEN)
    main([url, *others, "--seconds", "2"])
    assert json.loads((tmp_path / "load.json").read_text())["by_kind"]["both"]["outcomes"] == {"ok": 4}


# Not imported here, as it would exchange this process's sockets and threads for its own.
def test_users_of_locust(arguments: list[str], tmp_path: Path) -> None:
    if find_spec("locust") is None:
        lacking('Locust: pip install "tandemrt[load]"')
    main([*arguments, "--users", "40", "--seconds", "3"])
    facts = json.loads((tmp_path / "load.json").read_text())
    for kind in ("hand-over", "picture"):
        assert facts["by_kind"][kind]["outcomes"]["ok"] > 0
    # 40 of which 17 are let in at once.
    assert facts["by_kind"]["both"]["outcomes"].keys() == {"ok", "429 busy"}


def test_where_locust_is_not_installed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_load, "find_spec", lambda _: None)
    with pytest.raises(
        BenchmarkError, match=r"locust: is not installed\. Install it: pip install \"tandemrt\[load\]\""
    ):
        main([*arguments, "--seconds", "1"])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [(["--weights", "3"], "--weights: not usable, got '3'"), (["--pid", "4194304"], "--pid: there is no such process")],
)
def test_what_cannot_be_used_is_told_beforehand(wrong: list[str], told: str, arguments: list[str]) -> None:
    with pytest.raises(ArgumentError, match=told):
        main([*arguments, *wrong])


def test_who_is_no_server_is_told(server: httpx.Client) -> None:
    with pytest.raises(BenchmarkError, match=r"does not say what it serves \(HTTP Error 401"):
        server_facts(str(server.base_url), "another-token-of-some-length")
    with pytest.raises(BenchmarkError, match="does not say what it serves"):
        server_facts("http://127.0.0.1:9", None)


def test_a_server_that_hands_nothing_over_is_told(server: httpx.Client) -> None:
    url = str(server.base_url)
    with pytest.raises(BenchmarkError, match=r"does not hand over what users will ask for \(HTTP Error 422"):
        plan_of(url, TOKEN, {"prompt": "red", "steps": {"unet": 0}})


ASKED = {HANDOFF: {"seed": 7, "until": 2, "plan": "a"}, GENERATIONS: {"seed": 7}}
STATE = Handover(np.zeros((1, 1, 4, 8, 8), np.float32), 2, "a", "b", 7)


def handed(**others: Any) -> bytes:
    return replace(STATE, **others).to_bytes()


def painted(start: bytes, *seeds: int) -> bytes:
    return json.dumps({"data": [{"b64_json": base64.b64encode(start).decode()}], "seeds": seeds}).encode()


@pytest.mark.parametrize(
    ("path", "status", "body", "outcome"),
    [
        (HANDOFF, 200, handed(), "ok"),
        (HANDOFF, 200, handed(seed=8), "another"),
        (HANDOFF, 200, handed(step=3), "another"),
        (HANDOFF, 200, handed(plan="b"), "another"),
        (HANDOFF, 200, handed()[:-4] + b"\0\0\0\1", "damaged"),
        (HANDOFF, 200, b"", "damaged"),
        (GENERATIONS, 200, painted(PNG, 7), "ok"),
        (GENERATIONS, 200, painted(PNG, 8), "another"),
        (GENERATIONS, 200, painted(b"GIF89a", 7), "damaged"),
        (GENERATIONS, 200, b'{"data": 3}', "damaged"),
        (GENERATIONS, 429, b'{"error": {"type": "busy"}}', "429 busy"),
        (HANDOFF, 502, b"<html>", "502"),
    ],
)
def test_outcomes(path: str, status: int, body: bytes, outcome: str) -> None:
    assert outcome_of(path, ASKED[path], status, body) == outcome


def test_figures_of_answers() -> None:
    seen = [(float(at), 10.0 * at, HANDOFF, "ok", 5) for at in range(1, 101)]
    refused = [(70.5, 1.0, HANDOFF, "429 busy", 5)] * 3
    figures = answers_figures([*seen, *refused], 125)
    assert figures["outcomes"] == {"ok": 100, "429 busy": 3}
    assert figures["good_per_s"] == 0.8
    assert figures["good_ms"] == pytest.approx({"p50": 505, "p90": 901, "p99": 990.1, "maximum": 1000})
    first, second, last = parts_figures([*seen, *refused], 125)
    assert (first["outcomes"], second["outcomes"], last["outcomes"]) == ({"ok": 59}, {"ok": 41, "429 busy": 3}, {})
    assert (last["to_s"], "good_ms" in last) == (125, False)


def test_growth_of_memory_is_that_after_pools_have_filled() -> None:
    filling = [(float(at), 100.0 + 50 * at) for at in range(10)]
    figures = memory_figures([*filling, *((float(at), 600 + at / 60) for at in range(20, 101))])
    assert figures["grows_mib_per_minute"] == pytest.approx(1)
    assert (figures["begins_mib"], figures["peak_mib"], figures["watched_s"]) == (
        100,
        pytest.approx(601.67, abs=0.01),
        100,
    )
    assert memory_figures([(0.0, 7.0)])["grows_mib_per_minute"] is None


def wait_for_samples(samples: list[tuple[float, float]], count: int) -> None:
    while len(samples) < count:
        time.sleep(0.01)


def test_a_process_is_watched_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_load, "EVERY_S", 0.02)
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other,
        watched([os.getpid(), other.pid]) as samples,
    ):
        wait_for_samples(samples[other.pid], 2)
        # It ends, and nobody has taken note of it yet.
        assert other.stdin is not None
        other.stdin.close()
        wait_for_samples(samples[os.getpid()], len(samples[os.getpid()]) + 20)
    assert len(samples[other.pid]) < len(samples[os.getpid()])
    assert min(mib for _, mib in samples[os.getpid()]) > 1
