"""What `tandemrt calibrate` does, by name; each command lives in a module that is imported when it is named."""

from __future__ import annotations

from collections.abc import Mapping

from ..runtime.cli.program import Entry

COMMANDS: Mapping[str, Entry] = {
    "collect": Entry("tandemrt.calibrate.collect", "keep what a bundle's models are given, for the others", "cpu"),
    "pictures": Entry("tandemrt.calibrate.pictures", "paint many prompts, for measures that need thousands", "cpu"),
    "split": Entry("tandemrt.calibrate.split_command", "which steps go to which denoiser, by measuring", "cpu"),
    "guidance": Entry(
        "tandemrt.calibrate.guidance_command", "find how much of guidance can be left out", "engines,cpu"
    ),
    "forget": Entry("tandemrt.calibrate.forget", "take a stored split, interval or window out of a bundle", "cpu"),
    "quality": Entry("tandemrt.calibrate.quality_command", "measure how good pictures are", "quality", plans=False),
    "quantize": Entry(
        "tandemrt.calibrate.quantize_command", "make a bundle in eight or four bits of another one", "engines,cpu"
    ),
}
