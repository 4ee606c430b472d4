"""The lines of docs/serve.md that ask a server, asked of one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tandemrt.runtime import Handover

from ..lacking import lacking

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text("utf-8")
SERVER = TEXT.partition("\n## The server\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```bash\n(curl .*?)```", SERVER, re.DOTALL)


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
