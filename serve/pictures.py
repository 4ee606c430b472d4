"""Pictures and their times, as answers tell them."""

from __future__ import annotations

import base64
import io

from PIL import Image

from tandemrt.runtime import Output


def encoded(image: Image.Image, form: str) -> str:
    """A picture's file, `png`, `jpeg` or `webp`, in base64."""
    stream = io.BytesIO()
    image.save(stream, form)
    return base64.b64encode(stream.getvalue()).decode()


def pictures_of(output: Output, form: str) -> list[str]:
    """Its pictures' files, in base64."""
    return [encoded(image, form) for image in output.images if isinstance(image, Image.Image)]


def milliseconds(output: Output) -> dict[str, float]:
    """What the stages took."""
    timings = output.timings
    stages = {"text_ms": timings.text_ms, "denoise_ms": timings.denoise_ms, "decode_ms": timings.decode_ms}
    return {name: round(value, 3) for name, value in {**stages, "total_ms": timings.total_ms}.items()}


def server_timing(output: Output) -> dict[str, str]:
    """The stages' times as a header that browsers show; W3C's `Server-Timing`."""
    stages = ", ".join(f"{name.removesuffix('_ms')};dur={value}" for name, value in milliseconds(output).items())
    return {"Server-Timing": stages}
