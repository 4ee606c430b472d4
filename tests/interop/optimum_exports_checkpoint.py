"""Exports a checkpoint with optimum, for TandemRT to adopt. See README.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum.exporters.onnx import main_export


def main() -> None:
    """Export, without optimum's own validation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    main_export(str(args.checkpoint), output=str(args.out), task="text-to-image", do_validation=False)


if __name__ == "__main__":
    main()
