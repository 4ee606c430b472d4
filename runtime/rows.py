"""What a generation's rows are given, whatever they run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .binding import Conditioning
from .control import Control
from .loras import Fitted
from .plan import Plan
from .ran_on import Ran

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rows:
    """What a generation's rows are given.

    conditioning: of the denoisers and the ControlNets, by component. draw_noise: draws into (B, C, h, w) float32; keep:
    is given a row and latents of that shape; both as of `Sampler`.
    loras: by component, which engines must take them; those for slots are in `conditioning` too.
    ran: told what the models run on. at_once: whether nobody looks between the rows.
    latent_space: the scaling factor and the shift of what a decoder is given; see `LatentSpace`.
    """

    plan: Plan
    conditioning: Mapping[str, Conditioning]
    draw_noise: Callable[[Float32], object]
    keep: Callable[[int, Float32], None] | None = None
    controls: tuple[Control, ...] = ()
    loras: Fitted = field(default_factory=Fitted)
    ran: Ran = field(default_factory=Ran)
    at_once: bool = False
    latent_space: tuple[float, float] = (1.0, 0.0)
