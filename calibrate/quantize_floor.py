"""Components whose quantization ruins pictures, where no budget says what they may take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from ..runtime.manifest import Loss
from .judged import Way

PSNR_FLOOR_DB, SSIM_FLOOR = 30.0, 0.9
_STEP_DB = 3.0  # half the squared error


def floor_warnings(ways: Mapping[str, Sequence[Way]], losses: Mapping[Way, Loss], *, held_out: bool) -> Iterator[str]:
    """A sentence for each way of painting whose pictures are below a floor, with the components that may be at fault.

    Those are what the way shows, but for what another way shows too whose pictures are good.

    held_out: whether prompts were given, without which a budget cannot be asked for.
    """
    good = {way for way, loss in losses.items() if loss.psnr_db >= PSNR_FLOOR_DB and loss.ssim >= SSIM_FLOOR}
    for way, loss in losses.items():
        if way in good:
            continue
        shown = [name for name, own in ways.items() if way in own]
        suspected = [name for name in shown if good.isdisjoint(ways[name])] or shown
        asked = PSNR_FLOOR_DB if loss.psnr_db < PSNR_FLOOR_DB else math.floor(loss.psnr_db) + _STEP_DB
        prompts = "" if held_out else " and --prompts with held-out ones"
        yield (
            f"{', '.join(suspected)}: pictures of {way} are {loss.psnr_db:.1f} dB and SSIM {loss.ssim:.2f} from the "
            f"float bundle's, expected {PSNR_FLOOR_DB:g} dB and {SSIM_FLOOR:g} or more. "
            f"Try --min-psnr {asked:g}{prompts}, which keeps the layers that hurt most in floating point."
        )
