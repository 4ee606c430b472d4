"""Opens a bundle in optimum's ORT pipelines and compares their picture with TandemRT's. See README.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from optimum import onnxruntime
from picture import Picture, report


def main() -> int:
    """Paint what the picture's request asks for; 0 where the two are close."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="or optimum's own export")
    parser.add_argument("picture", type=Path, help="as paint_bundle.py wrote it")
    args = parser.parse_args()
    class_name = "ORT" + json.loads((args.bundle / "model_index.json").read_bytes())["_class_name"].removeprefix("ORT")
    pipeline = getattr(onnxruntime, class_name).from_pretrained(args.bundle)
    picture = Picture.load(args.picture)
    return report(class_name, picture, picture.painted_by(pipeline))


if __name__ == "__main__":
    raise SystemExit(main())
