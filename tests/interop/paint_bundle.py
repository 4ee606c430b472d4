"""Paints one picture from a bundle with TandemRT and keeps it with its request. Run in TandemRT's environment."""

from __future__ import annotations

import argparse
from pathlib import Path

from picture import Picture

from tandemrt.runtime import Pipeline


def main() -> None:
    """Paint and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("picture", type=Path, help="the .npz file to write")
    parser.add_argument("--prompt", default="an oil painting of two sailing boats in a storm")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    args = parser.parse_args()
    with Pipeline.open(args.bundle) as pipe:
        output = pipe(
            args.prompt,
            negative_prompt=args.negative_prompt,
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            seed=args.seed,
            height=args.size,
            width=args.size,
            output_type="np",
        )
    Picture(
        pixels=output.images[0],
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
    ).save(args.picture)


if __name__ == "__main__":
    main()
