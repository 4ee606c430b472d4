"""`tandemrt serve` as a process: over TLS, until it is told to end; and what it refuses to serve."""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette

from tandemrt.runtime import ArgumentError, Cloud, Handover, Pipeline
from tandemrt.runtime.cli.program import main
from tandemrt.runtime.connections import KEPT_S
from tandemrt.serve import command
from tandemrt.serve.limits import Limits
from tandemrt.serve.patience import PATIENCE_S

from ..lacking import lacking
from .asking import TOKEN

TANDEM: dict[str, Any] = {"prompt": "red", "steps": {"cloud:unet": 2, "unet_free": 3}, "seed": 7}
# Some seconds of work, of which nothing is decoded.
STEPS = 250
SLOW: dict[str, Any] = {
    "prompt": "red", "steps": {"unet": STEPS}, "seed": 7, "height": 1024, "width": 1024, "num_images_per_prompt": 4,
    "until": STEPS,
}  # fmt: skip


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that signs itself, for this machine's own address; and its key."""
    if shutil.which("openssl") is None:
        lacking("openssl, which makes a certificate")
    folder = tmp_path_factory.mktemp("tls")
    file, key = folder / "certificate.pem", folder / "key.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=tandemrt", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", *kind, *name, "-keyout", str(key), "-out", str(file)]
    subprocess.run(made, check=True, capture_output=True)
    return file, key


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`tandemrt serve` on a free port, and its address."""
    program = [sys.executable, "-m", "tandemrt.runtime.cli", "serve", *arguments, "--port", "0", "--threads", "1"]
    running = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        said = running.stderr.readline()
        found = re.search(r"https?://\S+", said)
        assert found is not None, said + running.stderr.read()
        yield running, found[0]
    finally:
        running.kill()
        running.communicate()


def test_tls_and_an_end_that_finishes_what_runs(
    bundle: Path, pipe: Pipeline, certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key = certificate
    token = tmp_path / "token"
    token.write_text(TOKEN, "utf-8")
    tls = ["--max-steps", str(STEPS), "--tls-certificate", str(file), "--tls-key", str(key)]
    trusting: dict[str, Any] = {
        "verify": ssl.create_default_context(cafile=str(file)),
        "headers": {"authorization": f"Bearer {TOKEN}"},
    }
    with (
        process(str(bundle), "--token-file", str(token), *tls) as (running, url),
        httpx.Client(base_url=url, timeout=60, **trusting) as client,
        httpx.Client(base_url=url, **trusting) as other,  # which keeps its connection, and is not waited for
        ThreadPoolExecutor(1) as threads,
    ):
        assert url.startswith("https://127.0.0.1:")
        while client.get("/v2/health/ready").status_code != 200:
            time.sleep(0.02)

        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        with Pipeline.open(bundle, threads=1, cloud=Cloud(url, TOKEN, seconds=10)) as edge:
            assert edge(**TANDEM).degraded.startswith("untrusted")
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        with Pipeline.open(bundle, threads=1, cloud=Cloud(url, TOKEN, seconds=10)) as edge:
            output = edge(**TANDEM)
        assert output.degraded == ""
        np.testing.assert_array_equal(output.latents, pipe(**{**TANDEM, "steps": {"unet": 2, "unet_free": 3}}).latents)

        answer = threads.submit(client.post, "/v1/handoff", json=SLOW)
        while "tandemrt_running 1.0" not in other.get("/metrics").text:
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        address = client.base_url.host, client.base_url.port or 0
        with pytest.raises(ConnectionRefusedError):
            while True:
                socket.create_connection(address, timeout=5).close()
                time.sleep(0.02)
        assert running.poll() is None
        assert not answer.done()
        assert Handover.from_bytes(answer.result().content).step == STEPS
        assert running.wait(10) == 0
        assert "served" in running.stdout.read()  # type: ignore[union-attr]


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_public_address_in_plain_text_is_told(host: str, bundle: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN, "utf-8")
    with process(str(bundle), "--host", host, "--token-file", str(token)) as (running, url):
        while httpx.get(url.replace(host, "127.0.0.1") + "/v2/health/ready").status_code != 200:
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        said = running.stderr.read()  # type: ignore[union-attr]
    assert (said == "") == (host == "127.0.0.1")
    assert host == "127.0.0.1" or ("warning: " in said and "go over the network in plain text" in said)


def plan_of(*arguments: str) -> command.ServePlan:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.plan_from_arguments(parser.parse_args(["bundle", *arguments]))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_others_may_not_ask_without_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.TOKEN, raising=False)
    with pytest.raises(ArgumentError, match="--host: others could ask, without a token, got"):
        plan_of("--host", host)
    monkeypatch.setenv(command.TOKEN, TOKEN)
    plan = plan_of("--host", host)
    assert plan.token == TOKEN
    assert TOKEN not in str(command.plan_facts(plan))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_who_is_here_needs_no_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.TOKEN, raising=False)
    assert plan_of("--host", host).token is None


@pytest.mark.parametrize(
    ("told", "arguments"),
    [
        (r"--tls-certificate, --tls-key: one without the other\. Give both", ["--tls-key", "key.pem"]),
        (r"--token-file .*: cannot be read", ["--token-file", "nowhere"]),
        (r"--port: not usable, got 65536", ["--port", "65536"]),
        (r"--max-waiting: not usable, got -1, expected 0 or more", ["--max-waiting", "-1"]),
        (r"--max-batch: not usable, got 0, expected 1 or more", ["--max-batch", "0"]),
        (r"--max-seconds: not usable, got nan, expected 0\.001 or more", ["--max-seconds", "nan"]),
    ],
)
def test_arguments_that_cannot_be_used(told: str, arguments: list[str]) -> None:
    with pytest.raises(ArgumentError, match=told):
        plan_of(*arguments)


def test_a_device_hangs_up_on_kept_connections_before_the_server_does() -> None:
    config = command.server_config(Starlette(), Limits(), host="127.0.0.1", port=0)
    assert min(config.timeout_keep_alive, PATIENCE_S) > KEPT_S


def test_tokens_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(command.TOKEN, "short")
    with pytest.raises(ArgumentError, match=r"\$TANDEMRT_TOKEN: is no token, expected 16 or more ASCII characters"):
        plan_of()
    file = tmp_path / "token"
    for text, told in (("", "is empty"), ("short", "is no token"), ("ä" * 20, "is no token")):
        file.write_text(text, "utf-8")
        with pytest.raises(ArgumentError, match=told):
            plan_of("--token-file", str(file))


def test_what_cannot_be_served_is_told_in_a_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(command.TOKEN, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(bundle), "--port", str(port)]) == 2
        assert re.search(rf"--host, --port: cannot be listened on \(.*\), got '127\.0\.0\.1:{port}'",
                         capsys.readouterr().err)  # fmt: skip
    file = tmp_path / "no.pem"
    file.write_text("no certificate", "utf-8")
    arguments = ["--port", "0", "--tls-certificate", str(file), "--tls-key", str(file)]
    assert main(["serve", str(bundle), *arguments]) == 2
    assert "--tls-certificate, --tls-key: cannot be used" in capsys.readouterr().err
