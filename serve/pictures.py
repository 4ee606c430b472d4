"""Pictures and their times, as answers tell them."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, fields
from typing import Any

from PIL import Image

from tandemrt.runtime import Output, Request
from tandemrt.runtime.cli.pictures import maker_facts, png_facts
from tandemrt.runtime.cloud_reasons import reason_alone
from tandemrt.runtime.images import png_bytes

from .served import Served


def encoded(image: Image.Image, form: str) -> str:
    """A picture's file, `png`, `jpeg` or `webp`, in base64."""
    stream = io.BytesIO()
    image.save(stream, form)
    return base64.b64encode(stream.getvalue()).decode()


def pictures_of(output: Output, form: str, request: Request, served: Served) -> list[str]:
    """Its pictures' files, in base64; PNGs say how they were made, as those of `tandemrt generate` do."""
    images = [image for image in output.images if isinstance(image, Image.Image)]
    if form != "png":
        return [encoded(image, form) for image in images]
    again = {"negative_prompt": None, "seed": output.seeds[0], **_given(request)}
    facts = {
        "plan": output.plan.facts(),
        **maker_facts(served.digest, served.platform),
        "pictures": {},
        "loras": {},
    }
    if output.degraded:
        again["steps"] = output.plan.steps
        facts["degraded"] = reason_alone(output.degraded)
    files = [png_bytes(image, png_facts(again, seed, facts)) for seed, image in zip(output.seeds, images, strict=True)]
    return [base64.b64encode(file).decode() for file in files]


def _given(request: Request) -> dict[str, Any]:
    """The arguments that decide a request's pictures; they are JSON's types, as they came."""
    given = {one.name: value for one in fields(Request) if (value := getattr(request, one.name)) is not one.default}
    return {name: value for name, value in given.items() if name not in ("previews", "output_type", "strict_prompts")}


def stages_of(output: Output) -> dict[str, float]:
    """The milliseconds of each stage; `cloud` is other servers' part, with the way there and all tries."""
    timings = output.timings
    stages = {"text": timings.text_ms, "denoise": timings.denoise_ms, "decode": timings.decode_ms}
    if output.cloud:
        stages["cloud"] = 1e3 * sum(one.seconds for one in output.cloud)
    return {**stages, "total": timings.total_ms}


def milliseconds(output: Output) -> dict[str, float]:
    """What the stages took, as `text_ms` and so on."""
    return {f"{name}_ms": round(value, 3) for name, value in stages_of(output).items()}


def places(output: Output) -> dict[str, Any]:
    """Of a plan in two places what each hand-over took, and why steps of the cloud's ran here, if they did."""
    if not output.cloud and not output.degraded:
        return {}
    return {"cloud": [asdict(one) for one in output.cloud], "degraded": reason_alone(output.degraded)}


def dropped(output: Output) -> dict[str, Any]:
    """What was cut from prompts that were too long."""
    return {"dropped": [asdict(one) for one in output.dropped_text]}


def server_timing(output: Output) -> dict[str, str]:
    """The stages' times as a header that browsers show; W3C's `Server-Timing`."""
    stages = ", ".join(f"{name};dur={round(value, 3)}" for name, value in stages_of(output).items())
    return {"Server-Timing": stages}
