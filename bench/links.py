"""Latents and pictures over simulated links: `python -m tandemrt.bench.links --report REPORT.json --json FILE`.

How long a hand-over's message and a finished picture take on links of 5 to 200 Mbit/s and 10 to 100 ms, on TCP as it
is (see `simulated_link`; on Linux, with `ip` and /dev/net/tun); and from how many steps on a server the hand-over is
faster than other ways to the picture. REPORT.json, of `tandemrt bench BUNDLE --steps N,M`, says what steps take.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from tandemrt.runtime.errors import BenchmarkError
from tandemrt.runtime.handover import Handover

from . import simulated_link
from .arguments import add_report
from .break_even import Painter, Places, painter_of
from .figures import cell, markdown_table, spread, write_report
from .machine import described, machine_facts
from .program import run_program

SIDE, STEPS, LARGE = 512, 25, 10
MBITS, ROUND_TRIPS_MS = (5.0, 50.0, 200.0), (10.0, 40.0, 100.0)
# Assumed: devices so many times as fast as the one that was measured, and a server so many times as fast as those.
DEVICES, SERVER = (1, 10, 100), 10
HANDED, PICTURE = "state 2M float32", "picture PNG"
_LIMIT_S = 600.0


def messages() -> dict[str, bytes]:
    """What is sent, by name: hand-overs of a 512x512 picture's state, and the picture's files.

    A first-order solver's state is the latent, (1, 1, 4, 64, 64); DPM-Solver++ 2M's has the last prediction besides.
    """
    noise = np.random.default_rng(0).standard_normal((2, 1, 4, SIDE // 8, SIDE // 8), np.float32)
    states = {"latent": noise[:1], "state 2M": noise}
    made = {
        f"{name} {dtype}": Handover(state, LARGE, "0" * 64, "0" * 64, 0).to_bytes(dtype)
        for name, state in states.items()
        for dtype in ("float32", "float16")
    }
    picture = picture_like_a_photograph(SIDE)
    for form in ("PNG", "JPEG"):
        stream = io.BytesIO()
        picture.save(stream, form)
        made[f"picture {form}"] = stream.getvalue()
    return made


def picture_like_a_photograph(side: int) -> Image.Image:
    """Noise whose amplitudes fall as those of photographs, with the frequency to the power of 1.2.

    Tolhurst, Tadmor and Tang Chao, Amplitude spectra of natural images, 1992. Colours are a quarter of the lightness.
    """
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    noise = np.random.default_rng(0).standard_normal((3, side, side))
    planes = np.fft.irfft2(np.fft.rfft2(noise) / frequency**1.2, (side, side))
    light, *colours = planes / planes.std(axis=(1, 2), keepdims=True)
    pixels = np.stack([light + 0.25 * colours[0], light, light + 0.25 * colours[1]], axis=-1)
    return Image.fromarray(np.clip(128 + 55 * pixels, 0, 255).astype(np.uint8))


def link_figures(mbit: float, round_trip_ms: float, files: Sequence[Path], rounds: int) -> dict[str, Any]:
    """What each file takes on a link, milliseconds; the first round goes before those that count.

    Raises:
        BenchmarkError: no link can be simulated here.
    """
    words = [str(mbit), str(round_trip_ms), str(1 + rounds), *map(str, files)]
    command = [sys.executable, simulated_link.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode:
        remedy = "It takes Linux with `ip` and /dev/net/tun, and networks that one may make (`unshare --net`)."
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise BenchmarkError("links", said[-1], remedy=remedy)
    taken = {
        name: {part: spread(samples[1:]) for part, samples in parts.items()}
        for name, parts in json.loads(done.stdout).items()
    }
    return {"mbit_per_s": mbit, "round_trip_ms": round_trip_ms, "taken": taken}


def break_even(link: Mapping[str, Any], measured: Painter) -> list[dict[str, Any]]:
    """From how many of the plan's steps a hand-over pays on a link, device by device."""
    latent, picture = (link["taken"][name]["fresh_ms"]["median"] for name in (HANDED, PICTURE))
    figures = []
    for factor in DEVICES:
        device = measured.times_faster(factor)
        places = Places(device, device.times_faster(SERVER), STEPS, latent, picture)
        figures.append(
            {
                "device_times_faster": factor,
                "step_ms": [device.large_ms, device.small_ms],
                "least_steps": places.least(),
                "handed_over_ms": places.handed_over(LARGE),
                "on_device_ms": places.on_device(LARGE),
                "small_alone_ms": places.on_device(0),
                "on_server_ms": places.on_server,
            }
        )
    return figures


def markdown(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown: medians with the 10th to 90th percentile."""
    sizes, links = facts["bytes"], facts["links"]
    heads = ("link: ms on a new connection", *(f"{name}, {size / 1e3:.0f} kB" for name, size in sizes.items()))
    fresh = [[_told(link), *(cell(link["taken"][name]["fresh_ms"], 0) for name in sizes)] for link in links]
    kept_heads = ("link: ms on a connection that is kept", *sizes)
    kept = [[_told(link), *(cell(link["taken"][name]["kept_ms"], 0) for name in sizes)] for link in links]
    pays_heads = (
        "link, and the device's ms a step, large and small",
        *("pays beside the same plan here", "beside the small one alone here", "beside all of it there"),
        *("handed over, s", "same plan here, s", "small one alone here, s", "all there, s"),
    )
    pays = [
        [f"{_told(link)}; {one['step_ms'][0]:.0f}, {one['step_ms'][1]:.0f}", *_pays(one)]
        for link in links
        for one in link["break_even"]
    ]
    tables = (markdown_table(heads, fresh), markdown_table(kept_heads, kept), markdown_table(pays_heads, pays))
    return "\n".join(tables) + f"\n{_note(facts)} {described(facts['machine'])}\n"


def _note(facts: Mapping[str, Any]) -> str:
    device, rounds = facts["device"], facts["repeats"]
    return (
        f"{rounds} rounds; medians, in brackets the 10th to 90th percentile. A new connection's times begin with its "
        "handshake; TLS would add a round trip. Pictures are made up, with the frequencies of photographs, and sent as "
        "files; the server's JSON would add a third. The third table: from how many steps of the server's on, of "
        f"{STEPS}, a picture handed over ({HANDED}, new connection) is there sooner than the same plan's of the device "
        "alone, than that of its small denoiser alone, and than that of the server's large one alone, downloaded "
        f"({PICTURE}); then seconds of a picture, {LARGE} steps of it large, or as told. Measured was one device: its "
        f"text takes {device['text_ms']:.0f} ms, a step of the large denoiser {device['large_ms']:.0f}, of the small "
        f"one {device['small_ms']:.0f}, the decoder {device['decode_ms']:.0f} ({facts['device_of']}). Assumed are "
        f"faster ones, and a server {SERVER} times as fast as each, which waits for nobody; its share of a picture "
        f"handed over takes {100 * facts['server_share']:.0f}% of the time that all of it there does."
    )


def _told(link: Mapping[str, Any]) -> str:
    return f"{link['mbit_per_s']:g} Mbit/s, {link['round_trip_ms']:g} ms"


def _pays(one: Mapping[str, Any]) -> list[str]:
    least = ["never" if steps is None else f"from {steps}" for steps in one["least_steps"].values()]
    ways = ("handed_over_ms", "on_device_ms", "small_alone_ms", "on_server_ms")
    return [*least, *(f"{one[way] / 1e3:.2f}" for way in ways)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write FILE and a Markdown table beside it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, metavar="REPORT.json", help="what steps take")
    add_report(parser)
    parser.add_argument("--mbit", type=float, nargs="+", default=MBITS, help=f"of the links {MBITS}")
    parser.add_argument("--round-trip-ms", type=float, nargs="+", default=ROUND_TRIPS_MS, help=f"{ROUND_TRIPS_MS}")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds that count, after one (default 5)")
    given = parser.parse_args(arguments)
    device, of = painter_of(json.loads(given.report.read_bytes()))
    sent = messages()
    facts: dict[str, Any] = {
        "machine": machine_facts(),
        "repeats": given.repeats,
        "bytes": {name: len(body) for name, body in sent.items()},
        "device": {name: getattr(device, name) for name in ("text_ms", "large_ms", "small_ms", "decode_ms")},
        "device_of": of,
        "steps": {"all": STEPS, "large": LARGE},
        "server_times_faster": SERVER,
        "server_share": Places(device, device, STEPS, 0.0, 0.0).server_share(LARGE),
        "links": [],
    }
    with TemporaryDirectory() as folder:
        for name, body in sent.items():
            Path(folder, name).write_bytes(body)
        files = [Path(folder, name) for name in sent]
        for mbit, round_trip_ms in itertools.product(given.mbit, given.round_trip_ms):
            link = link_figures(mbit, round_trip_ms, files, given.repeats)
            facts["links"].append({**link, "break_even": break_even(link, device)})
    write_report(given.json, facts, markdown(facts))


if __name__ == "__main__":
    run_program(main)
