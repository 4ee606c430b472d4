"""What a request comes to on a bundle and a target, before anything runs: a job, or the reason why it is none."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .arguments import did_you_mean
from .bundle import Bundle
from .conditioning import check_conditioning
from .control import Control, checked_controls
from .editing import checked_editing
from .errors import RequestError
from .handover import require_models_of, rows_between
from .lora_engines import LoraEngines
from .loras import Fitted, Loras
from .manifest import Manifest
from .models import Models
from .noise import Noise
from .painting import Job
from .placement import refusal
from .plan import Plan, compile_plan
from .request import Request
from .request_checks import checked_array, checked_loras
from .sampling import require_engines, step_variants
from .targets import Target


@dataclass(frozen=True, slots=True)
class Jobs:
    """What requests are checked against."""

    bundle: Bundle
    target: Target
    models: Models
    loras: Loras
    lora_engines: LoraEngines

    def job(self, request: Request, manifest: Manifest, plan: Plan | None, *, at_once: bool) -> Job:
        """A request's; manifest: whose denoisers it may name. plan: of the whole request, where it is there already.

        Raises:
            TandemError: as a call of the pipeline does before it runs.
        """
        whole = plan or compile_plan(manifest, request.schedule)
        first, last = rows_between(whole, request.start, request.until)
        part = whole.part(first, last)
        shape = request.latent_shape(manifest, tuple(dict.fromkeys(whole.denoisers)))
        check_conditioning(request, manifest, part)
        if request.start is not None:
            own = self.bundle.manifest
            require_models_of(request.start, {name: own.model_digest(name) for name in own.names("denoiser")})
            checked_array("start", request.start.state, (1 + whole.table.history, *shape))
        if request.latents is not None:
            checked_array("latents", request.latents, shape)
        size = (shape[2] * manifest.latent.downsampling, shape[3] * manifest.latent.downsampling)
        editing = checked_editing(request, manifest, whole, size)
        controls = checked_controls(request, manifest, whole, size)
        controls = tuple(replace(one, rows=one.rows[first:last]) for one in controls if any(one.rows[first:last]))
        loras = self._fitted(request, part, shape)
        self._require_placeable(part, controls, loras, shape)
        decoders = self._decoder(request.decoder), self._decoder(None, tiny=True)
        at_once = at_once and not request.previews
        noise = Noise(request, shape)
        return Job(request, whole, first, part, size, noise, editing, controls, loras, *decoders, at_once)

    def _require_placeable(
        self, plan: Plan, controls: tuple[Control, ...], loras: Fitted, shape: tuple[int, ...]
    ) -> None:
        """Refuse a placement that the target, or the engines that are there, cannot do."""
        elsewhere = self.models.elsewhere is not None
        if elsewhere and plan.placement != "batched" and (plan.window is not None or loras.adapters):
            what = "LoRAs, or placement hybridiff, with a branch elsewhere"
            raise RequestError("placement", what, remedy="Ask for placement batched.")
        refused = refusal(plan.placement, self.target, self.models.threads)
        if refused is not None and not elsewhere:
            raise refused
        if plan.placement in ("sequential", "parallel", "hybridiff"):
            require_engines(plan, controls, loras, shape, self.models)
        if plan.window is None:
            return
        if controls or loras.adapters:
            what = "hybridiff with ControlNets or LoRAs, which its stages do not take"
            raise RequestError("placement", what, remedy="Ask for another placement.")
        devices = plan.window.pipelining.devices(self.models.devices)
        self.models.require_stages(plan.denoisers[0], devices, shape)

    def _fitted(self, request: Request, plan: Plan, shape: tuple[int, ...]) -> Fitted:
        """The request's LoRAs by component, each of which has engines that take them."""
        if not request.loras:
            return Fitted()
        encodes = bool(request.prompts) or (any(plan.guided) and bool(request.negative_prompts))
        fitted = self.loras.fitted(checked_loras(request.loras), plan.denoisers, encodes=encodes)
        return self.lora_engines.chosen(fitted, shape, step_variants(plan))

    def _decoder(self, name: str | None, *, tiny: bool = False) -> str:
        """The decoder asked for; without a name the bundle's first, or its tiny one."""
        decoders = self.bundle.manifest.names("vae_decoder")
        if name is None:
            return "vae_decoder_tiny" if tiny and "vae_decoder_tiny" in decoders else decoders[0]
        if name not in decoders:
            expected, remedy = f"one of {', '.join(decoders)}", did_you_mean(name, decoders)
            raise RequestError("decoder", "unknown", got=name, expected=expected, remedy=remedy)
        return name
