"""The tensors of a component: what its role needs, and whether a loaded model has those its manifest lists."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import BundleError
from .manifest import Component, Dtype, TensorSpec

# What a VAE's encoder makes: a distribution's parameters or, of a tiny autoencoder, the latent itself.
ENCODED = ("latent_parameters", "latent_sample")

Types = Mapping[str, Sequence[Dtype]]

_FLOAT: Sequence[Dtype] = ("float32",)


def _floats(*names: str) -> Types:
    return dict.fromkeys(names, _FLOAT)


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

    inputs: Types
    outputs: Types = field(default_factory=dict)
    groups: Sequence[Types] = ()
    residual_inputs: Residuals | None = None
    residual_outputs: Residuals | None = None


_SIZES = _floats("text_embeds", "time_ids")
_UNET = _Tensors(
    # A time step of whole numbers would lose the fractions of Karras' schedule.
    _floats("sample", "timestep", "encoder_hidden_states"),
    _floats("out_sample"),
    groups=(_SIZES, _floats("timestep_cond")),
    residual_inputs=TAKEN,
)
_TRANSFORMER = _Tensors(
    _floats("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"), _floats("out_hidden_states")
)
_BY_ROLE: Mapping[str, _Tensors] = {
    # Which of its outputs are used is for the manifest's text conditioning to say.
    "text_encoder": _Tensors({"input_ids": ("int64", "int32")}),
    "denoiser": _UNET,
    "controlnet": _Tensors(
        _floats("sample", "timestep", "encoder_hidden_states", "controlnet_cond", "conditioning_scale"),
        groups=(_SIZES,),
        residual_outputs=GIVEN,
    ),
    "vae_decoder": _Tensors(_floats("latent_sample"), _floats("sample")),
    "vae_encoder": _Tensors(_floats("sample")),
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
    """Raise BundleError when component `name` lists other tensors than its role needs, or of other types."""
    inputs, outputs = _needed(component)
    for kind, listed, needed in (("inputs", component.inputs, inputs), ("outputs", component.outputs, outputs)):
        names = [spec.name for spec in listed]
        # Nothing could be given to an input that is not known; an output may be left unread.
        missing, unknown = needed.keys() - set(names), set(names) - needed.keys() if kind == "inputs" else ()
        mistyped = any(spec.dtype not in needed.get(spec.name, (spec.dtype,)) for spec in listed)
        if missing or unknown or mistyped or len(set(names)) != len(names):
            raise BundleError(
                where,
                f"{kind} of {component.role} {name!r}",
                got=", ".join(f"{spec.name} {spec.dtype}" for spec in listed),
                expected=", ".join(f"{needed_name} {' or '.join(types)}" for needed_name, types in needed.items()),
                remedy="Export the bundle again.",
            )


def _needed(component: Component) -> tuple[Types, Types]:
    """The inputs a component of this role has, which depends on the optional ones it lists, and its outputs."""
    given, made = [{spec.name for spec in specs} for specs in (component.inputs, component.outputs)]
    tensors = _TRANSFORMER if component.role == "denoiser" and "hidden_states" in given else _BY_ROLE[component.role]
    inputs, outputs = {**tensors.inputs}, {**tensors.outputs}
    for group in tensors.groups:
        inputs |= group if given & group.keys() else {}
    if tensors.residual_inputs is not None and given & {*tensors.residual_inputs.names(given)}:
        inputs |= _floats(*tensors.residual_inputs.names(given))
    if tensors.residual_outputs is not None:
        outputs |= _floats(*tensors.residual_outputs.names(made))
    if component.role == "vae_encoder":
        outputs |= _floats(next((name for name in ENCODED if name in made), ENCODED[0]))
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
