"""Random weights for a module that exists by shape alone, written tensor by tensor, so that size costs no memory."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

_BYTES = 2  # of a float16
_EMBEDDING_STD = 0.02
# Far enough from 1 and 0 that an export which loses a norm's weight or a bias is noticed.
_JITTER = 0.02


def write_weights(module: nn.Module, path: Path, seed: str, shards: int = 1) -> None:
    """Write float16 weights for `module`, which may lie on the meta device, as safetensors.

    path: of the one file, or of which the shards' names and the index's are made as the hub's libraries make them.
    seed: a tensor's values depend on it and on the tensor's name alone. Linear and convolution weights keep a signal's
    variance, norms are close to the identity, embeddings have a standard deviation of 0.02; position embeddings are
    the class's own.

    Raises:
        OSError: the file cannot be written.
    """
    names = _published_names(module)
    tensors = module.state_dict()
    if shards == 1:
        _write_file(module, {name: (own, tensors[own]) for name, own in names.items()}, path, seed)
        return
    total = sum(tensors[own].numel() for own in names.values())
    files = [path.with_name(f"{path.stem}-{i + 1:05}-of-{shards:05}{path.suffix}") for i in range(shards)]
    contents: list[dict[str, tuple[str, Tensor]]] = [{} for _ in files]
    done = 0
    for name, own in names.items():
        contents[done * shards // total][name] = (own, tensors[own])
        done += tensors[own].numel()
    for file, content in zip(files, contents, strict=True):
        _write_file(module, content, file, seed)
    index = {
        "metadata": {"total_size": total * _BYTES},
        "weight_map": {name: file.name for file, content in zip(files, contents, strict=True) for name in content},
    }
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _published_names(module: nn.Module) -> dict[str, str]:
    """Names in published files → names in the module's state dict; what a file holds once appears once."""
    names = list(module.state_dict())
    if isinstance(module, CLIPTextModel):
        # transformers from 5 on leaves the prefix out.
        return {"text_model." + name.removeprefix("text_model."): name for name in names}
    if isinstance(module, T5EncoderModel):
        names.remove("encoder.embed_tokens.weight")
    return {name: name for name in names}


def _write_file(module: nn.Module, tensors: Mapping[str, tuple[str, Tensor]], path: Path, seed: str) -> None:
    """The safetensors format: the header's length in 8 bytes, the header as JSON, then the tensors without gaps."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (_, tensor) in tensors.items():
        end = offset + tensor.numel() * _BYTES
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for own, tensor in tensors.values():
            values = _values(module, own, tensor.shape, seed)
            stream.write(values.half().contiguous().numpy())


def _values(module: nn.Module, name: str, shape: torch.Size, seed: str) -> Tensor:
    """One tensor's values in float32; uniform, as PyTorch initializes its own layers, since that is also fastest."""
    owner, kind = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if isinstance(owner, PatchEmbed) and kind == "pos_embed":
        return _position_embedding(owner)
    if len(shape) == 1:
        centre, std = _centre(module, name), _JITTER
    elif isinstance(owner, nn.Embedding):
        centre, std = 0.0, _EMBEDDING_STD
    else:
        centre, std = 0.0, _gain(module, name) * shape[1:].numel() ** -0.5
    reach = 3**0.5 * std
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.empty(shape).uniform_(centre - reach, centre + reach, generator=generator)


def _gain(module: nn.Module, name: str) -> float:
    """What a layer does to a signal's standard deviation."""
    if isinstance(module, T5EncoderModel) and name.endswith(".SelfAttention.q.weight"):
        return float(module.config.d_kv) ** -0.5  # T5 does not divide its attention scores by the head's width
    if name.startswith("controlnet_cond_embedding."):
        return 1.5  # its activations, seven without a norm between, halve what is small
    # Without norms its sums with what skips a block would grow from block to block.
    return 0.8 if isinstance(module, AutoencoderTiny) else 1.0


def _centre(module: nn.Module, name: str) -> float:
    """The mean of a bias or of a norm's weight."""
    if isinstance(module, AutoencoderTiny) and name == f"decoder.layers.{len(module.decoder.layers) - 1}.bias":
        return 0.5  # a grey picture: these come as 0..1, and -1..1 is made of them afterwards
    return float(name.endswith(".weight"))


def _position_embedding(patches: PatchEmbed) -> Tensor:
    """What the class computes when it is made off the meta device: the checkpoint of Stable Diffusion 3 holds it."""
    return get_2d_sincos_pos_embed(
        patches.pos_embed.shape[-1],
        patches.pos_embed_max_size,
        base_size=patches.base_size,
        interpolation_scale=patches.interpolation_scale,
    ).unsqueeze(0)
