"""The lines of docs/serve.md that ask a server, asked of one; and its program for messages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from tandemrt.runtime import Handover, Pipeline
from tandemrt.runtime.cloud import MESSAGE, PROTOCOL
from tandemrt.serve.limits import Limits

from ..lacking import lacking

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text("utf-8")
SERVER = TEXT.partition("\n## The server\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```bash\n(curl .*?)```", SERVER, re.DOTALL)
PROGRAM = SERVER.partition("```python\n")[2].partition("```")[0]
JOB: dict[str, Any] = {"prompt": "a réd circle \U0001f534\n\x7f", "steps": {"unet": 2, "unet_free": 3}, "seed": 7}


def posted(client: httpx.Client, body: bytes) -> httpx.Response:
    return client.post("/v1/handoff", content=body, headers={"content-type": MESSAGE})


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    """The names that the program of the docs defines."""
    names: dict[str, Any] = {}
    exec(PROGRAM.replace("unet_small", "unet_free"), names)
    return names


def test_another_program_makes_a_request(program: dict[str, Any], client: httpx.Client) -> None:
    answer = posted(client, program["body"])
    assert answer.status_code == 200, answer.text
    assert Handover.from_bytes(answer.content).step == 10


def metadata(message: bytes) -> dict[str, str]:
    found: dict[str, str] = json.loads(message[8 : 8 + int.from_bytes(message[:8], "little")])["__metadata__"]
    return found


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_program_sends_a_state_and_checks_the_answer(
    dtype: str, encoded: bool, program: dict[str, Any], client: httpx.Client, pipe: Pipeline
) -> None:
    given = pipe.encode_prompt(JOB["prompt"]) if encoded else {"prompt": JOB["prompt"]}
    tensors = {name: values for name, values in given.items() if isinstance(values, np.ndarray)}
    handover = pipe(**JOB, until=2).handover
    asked = {**JOB, "until": 5, "start_step": 2, "plan": handover.plan, "dtype": dtype}
    if encoded:
        del asked["prompt"]
    facts = {"protocol": PROTOCOL, "request": json.dumps(asked, ensure_ascii=False)}
    answer = posted(client, program["message"]({**tensors, "state": handover.state.astype(dtype)}, facts))
    assert answer.status_code == 200, answer.text
    told = metadata(answer.content)
    seal = told.pop("sha256")
    assert metadata(program["message"](load(answer.content), told))["sha256"] == seal
    if dtype == "float32":
        np.testing.assert_array_equal(Handover.from_bytes(answer.content).state[0], pipe(**JOB).latents)


def test_a_wrong_seal_is_told_beside_the_right_one(program: dict[str, Any], client: httpx.Client) -> None:
    seal = metadata(program["body"])["sha256"]
    answer = posted(client, program["body"].replace(seal.encode(), b"0" * 64))
    assert answer.status_code == 400
    assert f"sha256, got '{'0' * 64}', expected {seal}. Send it again." in answer.json()["error"]["message"]


def test_what_a_body_may_have_at_the_defaults() -> None:
    stable_diffusion = SimpleNamespace(
        latent=SimpleNamespace(channels=4, downsampling=8),
        text=SimpleNamespace(max_length=77, width=768, pooled_width=0),
    )
    told = f"{Limits().body_bytes(stable_diffusion) / 2**20:.1f} MiB for SD 1.5 at the defaults"  # type: ignore[arg-type]
    assert told in TEXT


def test_every_endpoint_has_a_line() -> None:
    paths = set(re.findall(r"127\.0\.0\.1:8080(/[^\s'?]*)", "".join(BLOCKS)))
    assert paths == {
        "/v1/handoff", "/v1/images/generations", "/v1/images/stream", "/v2", "/v2/models/bundle",
        "/v2/models/bundle/ready", "/v2/health/live", "/v2/health/ready", "/metrics",
    }  # fmt: skip


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_its_lines_work(index: int, client: httpx.Client, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        lacking("curl")
    block = BLOCKS[index].replace("http://127.0.0.1:8080", str(client.base_url).rstrip("/"))
    block = block.replace("curl -sS", "curl -f -sS").replace("unet_small", "unet_free")
    done = subprocess.run(["bash", "-ec", block], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    if "/v1/handoff" in block:
        assert Handover.from_bytes((tmp_path / "state.safetensors").read_bytes()).step == 10
    elif "/v1/images/generations" in block:
        assert len(re.findall("b64_json", (tmp_path / "pictures.json").read_text("utf-8"))) == 2
    elif "/v1/images/stream" in block:
        assert len(re.findall("event: step", done.stdout)) == 25
        assert "event: picture" in done.stdout
    else:
        assert 'tandemrt_requests_total{endpoint="/v2/health/ready",outcome="ok"}' in done.stdout
