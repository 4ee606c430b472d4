"""What building engines takes: `python -m tandemrt.bench.engine_builds BUNDLE... --target TARGET... --json FILE`.

Per component and target: seconds, peak memory and size, and the seconds of having it again from the cache. TensorRT-RTX
builds stand beside plain ones through Polygraphy of the same graph and profile, in the same run. Take the figures on a
quiet machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.plan import BuildPlan, Request, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import UPDATE

from .arguments import add_report
from .figures import markdown_table, write_report
from .machine import described, machine_facts
from .program import run_program
from .starts import run_fresh

# At 512 x 512 pixels, or SDXL's own size, in float16.
GOALS = {"unet of sd15": {"build_s": 30, "peak_gib": 7}, "unet of sdxl": {"peak_gib": 20}, "cached_s": 1}
_PEERED = "tensorrt-rtx"
# What `trtexec` and `polygraphy convert` do: parse, build, write; for whatever architectures, as they do untold.
_PLAIN = """
import os
os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path
shapes = json.loads(sys.argv[2])
profile = Profile()
for name, (low, best, high) in shapes.items():
    profile.add(name, low, best, high)
began = time.perf_counter()
network = network_from_onnx_path(sys.argv[1], strongly_typed=True)
engine = engine_bytes_from_network(network, config=CreateConfig(profiles=[profile]))
with open(sys.argv[3], "wb") as stream:
    stream.write(engine)
facts["size_bytes"] = os.path.getsize(sys.argv[3])
mark("build")
"""


def build_figures(plan: BuildPlan) -> Iterator[dict[str, Any]]:
    """Build every engine of a plan but update engines in a fresh cache, then ask for it again."""
    for request in requests_of(plan, Bundle.open(plan.bundle)):
        if request.ingredients.variant == UPDATE:
            continue
        with TemporaryDirectory(dir=plan.cache) as scratch:
            cache = Path(scratch)
            built = ensure_engine(request, cache, _silent, {})
            began = time.perf_counter()
            again = ensure_engine(request, cache, _silent, {})
            cached_s = time.perf_counter() - began
            if again.built:
                raise RuntimeError(f"{request.title}: was not found in the cache")
            row = {
                "bundle": plan.bundle.name,
                "component": request.component,
                "target": str(request.target),
                "build_s": built.engine.build_s,
                "peak_gib": built.engine.peak_memory_bytes / 2**30,
                "size_mb": built.engine.size_bytes / 1e6,
                "layers": built.engine.layer_count,
                "cached_s": cached_s,
            }
            if request.target.backend == _PEERED:
                row["plain"] = _plain(request, cache)
        yield row


def markdown(facts: dict[str, Any]) -> str:
    """The figures as one Markdown table."""
    heads = (
        "component, target",
        "build, s",
        "peak, GiB",
        "size, MB",
        "from cache, s",
        "plain build, s",
        "its peak, GiB",
    )
    rows = [
        [
            f"{row['bundle']} {row['component']}, `{row['target']}`",
            f"{row['build_s']:.1f}",
            f"{row['peak_gib']:.1f}",
            f"{row['size_mb']:.0f}",
            f"{row['cached_s']:.3f}",
            f"{row['plain']['build_s']:.1f}" if "plain" in row else "–",
            f"{row['plain']['peak_gib']:.1f}" if "plain" in row else "–",
        ]
        for row in facts["builds"]
    ]
    note = (
        f"Profile {facts['profile']}. Plain: Polygraphy with the same graph and profile, in the same run. From cache: "
        "what was hashed when it was built and not touched since is taken as it is. Random weights. "
    )
    return markdown_table(heads, rows) + "\n" + note + described(facts["machine"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--target", action="append", required=True, help="as of `tandemrt build-engine`")
    parser.add_argument("--component", action="append", default=[], help="components to build (default: all)")
    parser.add_argument("--profile", default="512x512")
    add_report(parser)
    parser.add_argument("--scratch", type=Path, help="a folder with space for the engines")
    options = parser.parse_args(arguments)
    facts: dict[str, Any] = {"machine": machine_facts(), "goals": GOALS, "profile": options.profile, "builds": []}
    with TemporaryDirectory(dir=options.scratch) as scratch:
        for bundle in options.bundles:
            wanted = set(options.component) or set(Bundle.open(bundle).manifest.components)
            plan = BuildPlan(
                bundle=bundle,
                targets=tuple(map(parse_target, options.target)),
                cache=Path(scratch),
                components=tuple(name for name in Bundle.open(bundle).manifest.components if name in wanted),
                profiles=(parse_profile(options.profile),),
            )
            facts["builds"] += build_figures(plan)
    write_report(options.json, facts, markdown(facts))


def _plain(request: Request, folder: Path) -> dict[str, float]:
    (profile,) = request.ingredients.profiles
    shapes = {name: (one.min, one.opt, one.max) for name, one in profile.items()}
    made = run_fresh(_PLAIN, str(request.model), json.dumps(shapes), str(folder / "plain"))
    return {
        "build_s": made["build_s"],
        "peak_gib": made["build_peak_mib"] / 1024,
        "size_mb": made["size_bytes"] / 1e6,
    }


def _silent(_message: str, _done: int, _total: int) -> None:
    """Report to nobody."""


if __name__ == "__main__":
    run_program(main)
