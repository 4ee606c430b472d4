"""The tensors of a component: what its role needs, and whether a loaded model has those its manifest lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import BundleError
from .manifest import Component, TensorSpec

# role -> the inputs a component of it has, and no others; the outputs it has at least
_NEEDED: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "text_encoder": (frozenset({"input_ids"}), frozenset({"last_hidden_state"})),
    "denoiser": (frozenset({"sample", "timestep", "encoder_hidden_states"}), frozenset({"out_sample"})),
    "vae_decoder": (frozenset({"latent_sample"}), frozenset({"sample"})),
    # Its output is a distribution's parameters or, of a tiny autoencoder, the latent itself.
    "vae_encoder": (frozenset({"sample"}), frozenset()),
}


def check_role(where: str, name: str, component: Component) -> None:
    """Raise BundleError when component `name` lists other tensors than its role needs."""
    inputs, outputs = _NEEDED[component.role]
    for kind, listed, needed in (("inputs", component.inputs, inputs), ("outputs", component.outputs, outputs)):
        names = [spec.name for spec in listed]
        # Nothing could be given to an input that is not known; an output may be left unread.
        missing, unknown = needed - set(names), set(names) - needed if kind == "inputs" else ()
        if missing or unknown or len(set(names)) != len(names):
            expected = ", ".join(sorted(needed))
            raise BundleError(
                where,
                f"{kind} of {component.role} {name!r}",
                got=names,
                expected=expected,
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
