"""What `tandemrt bench` does, by name; what is no name is a bundle, for `run`."""

from __future__ import annotations

from collections.abc import Mapping

from tandemrt.runtime.cli.program import Entry

COMMANDS: Mapping[str, Entry] = {
    "run": Entry("tandemrt.bench.run_command", "measure a bundle, beside its peers, and write a report", "cpu,bench"),
    "hybrid": Entry(
        "tandemrt.bench.hybrid_command", "what handing over to the small denoiser costs, and does", "cpu,bench"
    ),
    "cfg": Entry("tandemrt.bench.cfg_command", "what the ways of running guidance cost, and do", "cpu,bench"),
    "vae": Entry("tandemrt.bench.vae_command", "what a bundle's decoders cost, and do", "cpu,bench"),
    "onestep": Entry("tandemrt.bench.onestep_command", "what a picture of one step takes, model by model", "cpu,bench"),
    "build": Entry(
        "tandemrt.bench.build_command", "what building engines takes, and having them again", "engines,bench"
    ),
    "cold": Entry("tandemrt.bench.cold_command", "from a fresh interpreter to the first picture", "cpu,bench"),
    "limits": Entry("tandemrt.bench.limits_command", "how near models come to what the machine can do", "cpu,engines"),
    "compare": Entry(
        "tandemrt.bench.compare_command", "what differs between two reports beyond noise", "bench", plans=False
    ),
    "setup": Entry("tandemrt.bench.setup_command", "install a peer to measure beside", "bench", plans=False),
}
DEFAULT = "run"
