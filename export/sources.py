"""Everything an export reads, found and checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..runtime.errors import ArgumentError
from ..runtime.lora_names import PARTS
from ..runtime.manifest import SchedulerDefaults
from ..runtime.solvers import compile_table, resolve_solver
from ..runtime.staging import require_free
from .agreement import (
    latent_space,
    prediction_type,
    require_controlnet,
    require_decoder,
    require_denoiser,
    require_latents,
    require_main,
)
from .checkpoint import (
    DENOISERS,
    Checkpoint,
    DenoiserSource,
    Part,
    read_autoencoder,
    read_checkpoint,
    read_controlnet,
    read_denoiser,
)
from .facts import denoiser_facts
from .foreign_graph import is_foreign
from .lora import fuse, read_lora, require_used
from .plan import ExportPlan
from .single_file import read_single_file
from .weights import parameters, source_digest


@dataclass(frozen=True)
class Sources:
    """A checkpoint and the further denoisers, decoders and ControlNets that go into its bundle, by name."""

    main: Checkpoint
    denoisers: Mapping[str, DenoiserSource]
    decoders: Mapping[str, Part]
    controlnets: Mapping[str, Part]
    # One file may hold every model, and is read as a whole.
    _digests: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width of the latents the main denoiser was made for."""
        return denoiser_facts(self.main.denoiser).sample_size

    def parts(self) -> dict[str, Part]:
        """The part that every component of the bundle is made from, in the manifest's order."""
        return {
            **_encoders(self.main),
            self.main.family.denoiser: self.main.denoiser,
            **{name: source.part for name, source in self.denoisers.items()},
            **self.controlnets,
            "vae_decoder": self.main.vae,
            **self.decoders,
            "vae_encoder": self.main.vae_encoder or self.main.vae,
        }

    def is_controlled(self, denoiser: Part) -> bool:
        """Whether the bundle's ControlNets, which fit the main denoiser, fit this one too."""
        main = denoiser_facts(self.main.denoiser)
        fits = denoiser_facts(denoiser).residuals == main.residuals
        return bool(self.controlnets) and fits and not is_foreign(denoiser.weights)

    def own_scheduler(self, name: str) -> SchedulerDefaults | None:
        """A component's scheduler where it brings one that differs from the bundle's."""
        scheduler = self.denoisers[name].scheduler if name in self.denoisers else None
        return scheduler if scheduler != self.main.scheduler else None

    @property
    def assumption(self) -> str | None:
        """What a single file was taken for, and how to say otherwise; None for a folder, which says so itself."""
        if self.main.preset is None:
            return None
        return (
            f"{self.main.folder.name} is taken for {self.main.preset}, with {self.main.scheduler.class_name}: its "
            "tensors cannot tell a model distilled from it, such as a turbo one, which needs --solver, "
            "--solver-config, --timesteps, --num-inference-steps or --guidance-scale"
        )

    def digest(self, part: Part) -> str:
        """The sha256 over a part's configuration and weights, and by how much LoRAs are fused into them."""
        return source_digest(part.files, part.facts, self._digests)


def read_sources(plan: ExportPlan) -> Sources:
    """Find every model of a bundle and check that they fit together; weights themselves are not read yet.

    A denoiser in place of the checkpoint's own brings its scheduler along, where one stands beside it.

    Raises:
        ArgumentError: the scheduler does not take the plan's time steps or eta; a denoiser added under another name
            than the family's.
        CheckpointError: a folder is no checkpoint of a supported kind, or models disagree.
    """
    pickle = plan.allow_pickle
    main = _main(plan)
    if plan.denoiser is not None:
        source = read_denoiser(plan.denoiser, main, allow_pickle=pickle)
        require_latents("--denoiser", source, main)
        main = replace(main, denoiser=source.part, scheduler=source.scheduler or main.scheduler)
    if plan.vae is not None:
        vae = read_autoencoder(plan.vae, allow_pickle=pickle)
        require_decoder("--vae", vae, main)
        main = replace(main, vae=vae, vae_encoder=None)
    if plan.loras:
        _require_weights("--lora", {main.family.denoiser: main.denoiser, **_encoders(main)})
        main = _with_loras(main, plan)
    if plan.solver is not None or plan.solver_config:
        main = replace(main, scheduler=_asked_for(plan, main.scheduler))
    require_main(main)
    _require_defaults(plan, main.scheduler)
    by_role: dict[str, dict[str, Path]] = {"denoiser": {}, "vae_decoder": {}, "controlnet": {}}
    for each in plan.added:
        if each.role == "denoiser" and not each.name.startswith(f"{main.family.denoiser}_"):
            expected = f"{main.family.denoiser}_NAME, as {main.pipeline}'s denoiser is called"
            raise ArgumentError("--add", "name of a denoiser", got=each.name, expected=expected)
        if each.role == "controlnet":
            # Its residuals would need inputs that the graph has not.
            _require_weights(f"--add {each.name}", {main.family.denoiser: main.denoiser})
        by_role[each.role][each.name] = each.folder
    sources = Sources(
        main,
        {name: read_denoiser(path, main, allow_pickle=pickle) for name, path in by_role["denoiser"].items()},
        {name: read_autoencoder(path, allow_pickle=pickle) for name, path in by_role["vae_decoder"].items()},
        {name: read_controlnet(path, allow_pickle=pickle) for name, path in by_role["controlnet"].items()},
    )
    for name, denoiser in sources.denoisers.items():
        require_denoiser(name, denoiser, main)
    for name, decoder in sources.decoders.items():
        require_decoder(name, decoder, main)
    for name, controlnet in sources.controlnets.items():
        require_controlnet(name, controlnet, main)
    if plan.dtype != "fp32":
        _require_weights(f"--dtype {plan.dtype}", sources.parts())
    if plan.verify_against is not None and not any(is_foreign(part.weights) for part in sources.parts().values()):
        what, got = "is for ONNX graphs; weights are always compared with", str(plan.verify_against)
        raise ArgumentError("--verify-against", what, got=got, remedy="Leave it out.")
    return sources


def _encoders(main: Checkpoint) -> dict[str, Part]:
    return {name: text.encoder for name, text in main.texts.items()}


def _require_weights(option: str, parts: Mapping[str, Part]) -> None:
    """Check that parts are weights, not graphs that others made of them."""
    for name, part in parts.items():
        if is_foreign(part.weights):
            raise ArgumentError(
                option,
                f"{name} is an ONNX graph, which is taken as it is",
                got=str(part.folder),
                expected="a checkpoint",
                remedy="Give the checkpoint that it was exported from.",
            )


def _with_loras(main: Checkpoint, plan: ExportPlan) -> Checkpoint:
    """The checkpoint with the plan's LoRAs fused into its denoiser and its text encoders."""
    loras = [(read_lora(each.path, allow_pickle=plan.allow_pickle), each.scale) for each in plan.loras]
    parts = {main.family.denoiser: main.denoiser, **_encoders(main)}
    fused: dict[str, Part] = {}
    for name in PARTS:
        if name in parts:
            weights = fuse(parts[name].weights, loras, name)
            fused[name] = replace(parts[name], weights=weights, fused=weights.facts)
    for lora, _ in loras:
        require_used(lora, {name: fused[name].weights for name in PARTS if name in fused})
    texts = {name: replace(text, encoder=fused.get(name, text.encoder)) for name, text in main.texts.items()}
    return replace(main, denoiser=fused[main.family.denoiser], texts=texts)


def _main(plan: ExportPlan) -> Checkpoint:
    if plan.checkpoint.is_file():
        replaced = (*(DENOISERS if plan.denoiser else ()), *(("vae",) if plan.vae else ()))
        return read_single_file(plan.checkpoint, plan.tokenizer, plan.solver_config.get("prediction_type"), replaced)
    if plan.tokenizer is not None:
        expected = "a CHECKPOINT that is one file"
        raise ArgumentError(
            "--tokenizer", "a diffusers directory has its own", got=str(plan.tokenizer), expected=expected
        )
    return read_checkpoint(plan.checkpoint, allow_pickle=plan.allow_pickle)


def _asked_for(plan: ExportPlan, own: SchedulerDefaults) -> SchedulerDefaults:
    """The checkpoint's scheduler as the plan would have it; PlanError names what cannot be."""
    class_name, config = resolve_solver(plan.solver or own.class_name, own.config, plan.solver_config)
    return SchedulerDefaults(class_name=class_name, config=config)


def _require_defaults(plan: ExportPlan, scheduler: SchedulerDefaults) -> None:
    """Check that the scheduler takes the plan's time steps and eta; PlanError names what it does not."""
    if plan.timesteps is not None or plan.eta:
        steps = None if plan.timesteps is not None else plan.num_inference_steps or 1
        class_name, config = resolve_solver(scheduler.class_name, scheduler.config)
        compile_table(class_name, config, steps, timesteps=plan.timesteps, eta=plan.eta)


def describe(plan: ExportPlan) -> dict[str, Any]:
    """What an export would do, in JSON's types: the plan, the models found, and what they share.

    Raises:
        CheckpointError: as `read_sources`.
        ExportError: `plan.out` exists and may not be replaced.
    """
    require_free(plan.out, force=plan.force)
    sources = read_sources(plan)
    main, latent = sources.main, latent_space(sources.main.vae)
    return {
        **plan.as_json(),
        "taken_for": main.preset,
        "assumption": sources.assumption,
        "components": {
            name: {
                "class_name": part.class_name,
                "folder": str(part.folder),
                "parameters_in_file": parameters(part.weights),
            }
            for name, part in sources.parts().items()
        },
        "latent": {
            "channels": latent.channels,
            "downsampling": latent.downsampling,
            "scaling_factor": latent.scaling_factor,
            "shift_factor": latent.shift_factor,
        },
        "prediction_type": prediction_type(main.scheduler),
        "scheduler": main.scheduler.class_name,
        "spatial_multiple": max(
            denoiser_facts(part).multiple
            for part in (main.denoiser, *(source.part for source in sources.denoisers.values()))
        ),
    }
