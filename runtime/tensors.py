"""The tensors of a component: what its role needs, and whether a loaded model has those its manifest lists."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import BundleError
from .manifest import Component, Dtype, TensorSpec

GUIDANCE_EMBEDDING = "timestep_cond"
CONTROLNET_PREFIX = "controlnet_"
# What a VAE's encoder makes, a distribution's parameters or, of a tiny autoencoder, the latent itself, and how many
# channels it has for each of the latent's.
ENCODED: Mapping[str, int] = {"latent_parameters": 2, "latent_sample": 1}


@dataclass(frozen=True, slots=True)
class _Form:
    """How many dimensions a tensor has, and of which types it may be."""

    rank: int
    dtypes: Sequence[Dtype] = ("float32",)

    def __str__(self) -> str:
        return f"{' or '.join(self.dtypes)} of rank {self.rank}"

    def fits(self, spec: TensorSpec) -> bool:
        return spec.dtype in self.dtypes and len(spec.shape) == self.rank


Forms = Mapping[str, _Form]


def _floats(rank: int, *names: str) -> Forms:
    return dict.fromkeys(names, _Form(rank))


@dataclass(frozen=True, slots=True)
class Residuals:
    """The names of a ControlNet's results: `down` is followed by a number, from 0."""

    down: str
    mid: str

    def names(self, listed: Collection[str]) -> tuple[str, ...]:
        """All names, as many as are listed, the one that is not counted last."""
        count = sum(name.startswith(self.down) for name in listed)
        return *(f"{self.down}{index}" for index in range(count)), self.mid


GIVEN = Residuals("down_block_res_sample_", "mid_block_res_sample")
TAKEN = Residuals("down_block_additional_residual_", "mid_block_additional_residual")


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What a component of one kind has.

    inputs: those it needs, and no others beside those of `groups` and `residual_inputs`, of each all or none.
    outputs: those it needs at least, a ControlNet its residuals too.
    """

    inputs: Forms
    outputs: Forms = field(default_factory=dict)
    groups: Sequence[Forms] = ()
    residual_inputs: Residuals | None = None
    residual_outputs: Residuals | None = None


_SIZES = _floats(2, "text_embeds", "time_ids")
# A time step of whole numbers would lose the fractions of Karras' schedule.
_STEP_AND_TEXT = {**_floats(1, "timestep"), **_floats(3, "encoder_hidden_states")}
_UNET = _Tensors(
    {**_floats(4, "sample"), **_STEP_AND_TEXT},
    _floats(4, "out_sample"),
    groups=(_SIZES, _floats(2, GUIDANCE_EMBEDDING)),
    residual_inputs=TAKEN,
)
_TRANSFORMER = _Tensors(
    {**_floats(4, "hidden_states"), **_STEP_AND_TEXT, **_floats(2, "pooled_projections")},
    _floats(4, "out_hidden_states"),
)
_BY_ROLE: Mapping[str, _Tensors] = {
    # Which of its outputs are used is for the manifest's text conditioning to say.
    "text_encoder": _Tensors({"input_ids": _Form(2, ("int64", "int32"))}),
    "denoiser": _UNET,
    "controlnet": _Tensors(
        {**_floats(4, "sample", "controlnet_cond"), **_STEP_AND_TEXT, **_floats(1, "conditioning_scale")},
        groups=(_SIZES,),
        residual_outputs=GIVEN,
    ),
    "vae_decoder": _Tensors(_floats(4, "latent_sample"), _floats(4, "sample")),
    "vae_encoder": _Tensors(_floats(4, "sample")),
}


@dataclass(frozen=True, slots=True)
class LatentNames:
    """What a denoiser calls the latent it is given, and its prediction."""

    sample: str
    prediction: str


def latent_names(inputs: Iterable[TensorSpec]) -> LatentNames:
    """The names in a denoiser of these inputs, a UNet or a transformer."""
    transformer = spec_of(inputs, "hidden_states") is not None
    return LatentNames("hidden_states", "out_hidden_states") if transformer else LatentNames("sample", "out_sample")


def spec_of(specs: Iterable[TensorSpec], name: str) -> TensorSpec | None:
    """The tensor of that name, if it is there."""
    return next((spec for spec in specs if spec.name == name), None)


def check_role(where: str, name: str, component: Component) -> None:
    """Raise BundleError when component `name` lists other tensors than its role needs, or of other types or ranks."""
    inputs, outputs = _needed(component)
    for kind, listed, needed in (("inputs", component.inputs, inputs), ("outputs", component.outputs, outputs)):
        names = [spec.name for spec in listed]
        # Nothing could be given to an input that is not known; an output may be left unread.
        missing, unknown = needed.keys() - set(names), set(names) - needed.keys() if kind == "inputs" else ()
        unfit = not all(needed[spec.name].fits(spec) for spec in listed if spec.name in needed)
        if missing or unknown or unfit or len(set(names)) != len(names):
            raise BundleError(
                where,
                f"{kind} of {component.role} {name!r}",
                got=_described(listed),
                expected=", ".join(f"{needed_name} {form}" for needed_name, form in needed.items()),
                remedy="Export the bundle again.",
            )


def _needed(component: Component) -> tuple[Forms, Forms]:
    """The inputs a component of this role has, which depends on the optional ones it lists, and its outputs."""
    given, made = [{spec.name for spec in specs} for specs in (component.inputs, component.outputs)]
    tensors = _TRANSFORMER if component.role == "denoiser" and "hidden_states" in given else _BY_ROLE[component.role]
    inputs, outputs = {**tensors.inputs}, {**tensors.outputs}
    for group in tensors.groups:
        inputs |= group if given & group.keys() else {}
    if tensors.residual_inputs is not None and given & {*tensors.residual_inputs.names(given)}:
        inputs |= _floats(4, *tensors.residual_inputs.names(given))
    if tensors.residual_outputs is not None:
        outputs |= _floats(4, *tensors.residual_outputs.names(made))
    if component.role == "vae_encoder":
        outputs |= _floats(4, next((name for name in ENCODED if name in made), next(iter(ENCODED))))
    return inputs, outputs


def check_loaded(where: str, loaded: Sequence[TensorSpec], listed: Sequence[TensorSpec]) -> None:
    """Compare a loaded model's tensors with the manifest's, in any order.

    Names, types and ranks must be equal, and sizes wherever both are numbers.

    Raises:
        BundleError: they differ; `where` names the model.
    """
    by_name = {spec.name: spec for spec in listed}
    if len(loaded) != len(listed) or not all(
        spec.name in by_name and _fits(spec, by_name[spec.name]) for spec in loaded
    ):
        raise BundleError(
            where,
            "tensors of the model",
            got=_described(loaded),
            expected=_described(listed),
            remedy="Export the bundle again.",
        )


def _fits(loaded: TensorSpec, listed: TensorSpec) -> bool:
    return (
        loaded.dtype == listed.dtype
        and len(loaded.shape) == len(listed.shape)
        and all(
            size == other
            for size, other in zip(loaded.shape, listed.shape, strict=True)
            if isinstance(size, int) and isinstance(other, int)
        )
    )


def _described(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in specs)
