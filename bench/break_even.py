"""From how many steps on a server a hand-over pays: arithmetic on what steps, messages and pictures take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandemrt.runtime.errors import BenchmarkError


@dataclass(frozen=True, slots=True)
class Painter:
    """Milliseconds of one machine: of the text, of a step of either denoiser, of decoding a picture."""

    text_ms: float
    large_ms: float
    small_ms: float
    decode_ms: float

    def times_faster(self, factor: float) -> Painter:
        return Painter(self.text_ms / factor, self.large_ms / factor, self.small_ms / factor, self.decode_ms / factor)


@dataclass(frozen=True, slots=True)
class Places:
    """A plan of so many steps on a device and a server.

    latent_ms, picture_ms: from the question to the last byte of its answer, besides what making it takes.
    """

    device: Painter
    server: Painter
    steps: int
    latent_ms: float
    picture_ms: float

    def handed_over(self, large: int) -> float:
        """Milliseconds of a picture whose first steps the server runs."""
        return self.server.text_ms + large * self.server.large_ms + self.latent_ms + self._rest(large)

    def on_device(self, large: int) -> float:
        """Milliseconds of the same picture without a server."""
        return large * self.device.large_ms + self._rest(large)

    @property
    def on_server(self) -> float:
        """Milliseconds of a picture of the large denoiser alone, downloaded."""
        return self.server.text_ms + self.steps * self.server.large_ms + self.server.decode_ms + self.picture_ms

    def server_share(self, large: int) -> float:
        """The server's time for a hand-over, as a share of that for painting all of it there."""
        server = self.server
        handed = server.text_ms + large * server.large_ms
        return handed / (server.text_ms + self.steps * server.large_ms + server.decode_ms)

    def least(self) -> dict[str, int | None]:
        """From how many steps of the server's the hand-over is faster, None where it never is.

        same_plan: than the device with the same plan. small_alone: than the device with the small denoiser alone.
        whole_picture: than the server with all of it, and the picture's download.
        """
        every = range(1, self.steps + 1)
        alone, whole = self.on_device(0), self.on_server
        return {
            "same_plan": next((k for k in every if self.handed_over(k) < self.on_device(k)), None),
            "small_alone": next((k for k in every if self.handed_over(k) < alone), None),
            "whole_picture": next((k for k in every if self.handed_over(k) < whole), None),
        }

    def _rest(self, large: int) -> float:
        """What the device does in any case."""
        return self.device.text_ms + (self.steps - large) * self.device.small_ms + self.device.decode_ms


def painter_of(report: Mapping[str, Any]) -> tuple[Painter, str]:
    """The machine that a report of `tandemrt bench` of a plan of two denoisers is of; and what it was measured with.

    Of its first contender, medians.

    Raises:
        BenchmarkError: it is no such report.
    """
    try:
        sections = {section["key"]: section["rows"] for section in report["sections"]}
        name = sections["pictures"][0]["name"]
        parts = {
            row["name"].removeprefix(f"{name}: "): float(np.median(row["figures"]["ms"]["samples"]))
            for row in sections["parts"]
            if row["name"].startswith(f"{name}: ")
        }
        (large, large_steps), (small, small_steps) = _steps(report["request"]["steps"], parts)
        painter = Painter(
            parts["text encoders"], parts[large] / large_steps, parts[small] / small_steps, parts["decoder"]
        )
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        remedy = "Name the report.json of `tandemrt bench BUNDLE --steps N,M --out DIR`."
        raise BenchmarkError("report", f"not of a plan of two denoisers ({error})", remedy=remedy) from error
    return painter, f"{report['title']}, {name}, {large} and {small}"


def _steps(told: str, parts: Mapping[str, float]) -> list[tuple[str, int]]:
    """What a report calls its steps, such as `4,6` or `unet 4, unet_small 6`, by denoiser."""
    names = [name for name in parts if name.startswith(("unet", "transformer"))]
    return [(name, int(part.split()[-1])) for name, part in zip(names, told.split(","), strict=True)]
