"""One contender of `tandemrt.bench.tandem`, in an interpreter of its own: paints a picture for each line it reads."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

OURS, EAGER, COMPILED = "tandemrt", "diffusers", "diffusers, torch.compile"
TOKENS = 77
Paint = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Case:
    """What is painted: steps of each denoiser, in the order they run, guidance, the picture's side and decoder.

    bundle: what this runtime paints it from. preset, scale: of the architectures that diffusers builds it of.
    """

    name: str
    bundle: str
    preset: str
    scale: Literal["true", "tiny"]
    steps: Mapping[str, int]
    guidance_scale: float
    decoder: str
    size: int


class Contender:
    """A contender's process; it has loaded and painted nothing before the first `seconds`."""

    def __init__(self, kind: str, case: Case, target: str, threads: int | None) -> None:
        facts = json.dumps({"kind": kind, "case": asdict(case), "target": target, "threads": threads})
        command = [sys.executable, "-m", __name__, facts]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, seed: int) -> float:
        """What a picture takes from its text to its pixels.

        Raises:
            RuntimeError: the contender failed; what it said is on stderr.
        """
        told, answers = _pipes(self._process)
        try:
            told.write(f"{seed}\n")
            told.flush()
            answer = answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"a contender ended with exit status {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        told, answers = _pipes(self._process)
        answers.close()
        told.close()
        self._process.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer every seed on stdin with the seconds its picture took, until there is no more."""
    facts = json.loads((sys.argv[1:] if arguments is None else arguments)[0])
    case, threads = Case(**facts["case"]), facts["threads"]
    if facts["kind"] == OURS:
        paint = ours(case, facts["target"], threads)
    else:
        paint = diffusers_painter(case, threads, compiled=facts["kind"] == COMPILED)
    for line in sys.stdin:
        began = time.perf_counter()
        paint(int(line))
        print(time.perf_counter() - began, flush=True)


def ours(case: Case, target: str, threads: int | None) -> Paint:
    """This runtime on a bundle. No text comes twice, so that none is remembered."""
    from tandemrt.runtime import Pipeline  # noqa: PLC0415 — each contender imports what it needs alone

    pipe = Pipeline.open(case.bundle, target, threads=threads)

    def paint(seed: int) -> None:
        arguments: dict[str, Any] = {"height": case.size, "width": case.size, "decoder": case.decoder}
        pipe(
            f"a red circle {seed}",
            negative_prompt=f"blue {seed}",
            steps=dict(case.steps),
            guidance_scale=case.guidance_scale,
            seed=seed,
            output_type="np",
            **arguments,
        )

    return paint


def diffusers_painter(case: Case, threads: int | None, *, compiled: bool) -> Paint:
    """diffusers' modules in float32 with random weights, in the operations of `StableDiffusionPipeline.__call__`.

    Left out, in its favour: the tokenizer, progress bar, callbacks and the conversion to an image.
    """
    import diffusers  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from tandemrt.export.presets import models, read_preset  # noqa: PLC0415
    from tandemrt.export.random_checkpoint import build  # noqa: PLC0415

    if threads is not None:
        torch.set_num_threads(threads)
    preset = read_preset(case.preset)
    named = {**preset.models, **preset.added}
    vae = named[case.decoder if case.decoder in named else "vae"]
    built = {name: build(models()[named[name]], case.scale).eval() for name in ("text_encoder", *case.steps)}
    decoder = build(models()[vae], case.scale).eval()
    config = {**preset.scheduler.config}
    scheduler = getattr(diffusers, preset.scheduler.class_name).from_config(config)
    encode = built["text_encoder"]
    run = {name: torch.compile(built[name]) if compiled else built[name] for name in case.steps}
    decode = torch.compile(decoder.decode) if compiled else decoder.decode
    by_step = [name for name, count in case.steps.items() for _ in range(count)]
    guided, side = case.guidance_scale > 1, case.size // 8

    @torch.no_grad()
    def paint(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(encode.config.vocab_size, (1 + guided, TOKENS), generator=generator)
        text = torch.cat([encode(each[None])[0] for each in ids])
        scheduler.set_timesteps(len(by_step))
        latents = torch.randn((1, 4, side, side), generator=generator) * scheduler.init_noise_sigma
        for name, timestep in zip(by_step, scheduler.timesteps, strict=True):
            given = scheduler.scale_model_input(torch.cat([latents] * (1 + guided)), timestep)
            made = run[name](given, timestep, encoder_hidden_states=text, return_dict=False)[0]
            if guided:
                unconditional, conditional = made.chunk(2)
                made = unconditional + case.guidance_scale * (conditional - unconditional)
            latents = scheduler.step(made, timestep, latents, return_dict=False)[0]
        decode(latents / decoder.config.scaling_factor, return_dict=False)

    return paint


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a contender has no pipes")
    return process.stdin, process.stdout


if __name__ == "__main__":
    main()
