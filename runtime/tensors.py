"""The tensors of a component: what its role needs, and whether a loaded model has those its manifest lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import BundleError
from .manifest import Component, Dtype, TensorSpec

_FLOAT: Sequence[Dtype] = ("float32",)
# role -> the inputs a component of it has, and no others; the outputs it has at least; and the types they may have
_NEEDED: Mapping[str, tuple[Mapping[str, Sequence[Dtype]], Mapping[str, Sequence[Dtype]]]] = {
    "text_encoder": ({"input_ids": ("int64", "int32")}, {"last_hidden_state": _FLOAT}),
    # A time step of whole numbers would lose the fractions of Karras' schedule.
    "denoiser": ({"sample": _FLOAT, "timestep": _FLOAT, "encoder_hidden_states": _FLOAT}, {"out_sample": _FLOAT}),
    "controlnet": ({}, {}),
    "vae_decoder": ({"latent_sample": _FLOAT}, {"sample": _FLOAT}),
    # Its output is a distribution's parameters or, of a tiny autoencoder, the latent itself.
    "vae_encoder": ({"sample": _FLOAT}, {}),
}


def check_role(where: str, name: str, component: Component) -> None:
    """Raise BundleError when component `name` lists other tensors than its role needs, or of other types."""
    inputs, outputs = _NEEDED[component.role]
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
