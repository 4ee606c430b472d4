"""Opens a checkpoint in diffusers and compares its picture with TandemRT's. See README.md."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from picture import Picture, report


def main() -> int:
    """Paint what the picture's request asks for; 0 where the two are close."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("picture", type=Path, help="as paint_bundle.py wrote it")
    args = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(args.checkpoint, torch_dtype=torch.float32)
    picture = Picture.load(args.picture)
    return report(type(pipeline).__name__, picture, picture.painted_by(pipeline))


if __name__ == "__main__":
    raise SystemExit(main())
