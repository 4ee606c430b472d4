"""The architectures of the shapes family, as torch modules with fresh or given weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tandemrt.export.pruned import autoencoder_kl_from_config, pruned_shapes, resize_inner_widths

TEXT_LENGTH = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    # Not read by DPM-Solver++, but by the solvers one may switch to, as in Stable Diffusion's configuration.
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}

_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 4,  # diffusers' legacy name: the number of heads
}
# Inner ResNet widths and heads in Hybrid-SD's order: down 0, down 1, up 0.0, 0.1, 1.0, 1.1.
SMALL_PRUNING = {
    "block_mid_channels": (32, 32, 32, 32, 32, 32),
    "block_selfattn_heads": (0, 1, 1, 1, 0, 0),
    "block_crossattn_heads": (0, 1, 1, 1, 0, 0),
}
ONE_STEP_PRUNING = {
    "block_mid_channels": (64, 96, 96, 64, 32, 32),
    "block_selfattn_heads": (0, 3, 2, 2, 0, 0),
    "block_crossattn_heads": (0, 3, 3, 3, 0, 0),
}
_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": 1.0,
}


def large_unet() -> UNet2DConditionModel:
    """5.8 M parameters; two layers per block, cross-attention at 4x4 and in the middle."""
    return UNet2DConditionModel(**_UNET, layers_per_block=2)


def pruned_unet(pruning: dict[str, tuple[int, ...]]) -> UNet2DConditionModel:
    """BK-SDM's depth pruning (one layer per block, no middle) with Hybrid-SD's inner widths and heads."""
    unet = UNet2DConditionModel(**_UNET, layers_per_block=1, mid_block_type=None)
    unet.register_to_config(**pruning)
    resize_inner_widths(unet, pruned_shapes(unet, pruning))
    return unet


def tiny_vae() -> AutoencoderTiny:
    """TAESD's architecture; its encoder defines the family's latent space: (B, 4, H/8, W/8), scaling 1."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(1, 1, 2, 2),
        num_decoder_blocks=(2, 2, 1, 1),
        scaling_factor=1.0,
    )


def kl_vae() -> AutoencoderKL:
    """The baseline autoencoder, Stable Diffusion's class and block types."""
    return AutoencoderKL(**_KL, block_out_channels=(32, 32, 48, 48))


def small_vae() -> AutoencoderKL:
    """Hybrid-SD's small VAE: the baseline's encoder, a narrower decoder."""
    widths = {"encoder_block_out_channels": (32, 32, 48, 48), "decoder_block_out_channels": (16, 16, 32, 48)}
    return autoencoder_kl_from_config({**_KL, **widths})


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text model, 128 wide, three layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    )


def train_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learn a byte-pair encoding in CLIP's format, write `vocab.json` and `merges.txt` to `folder`, load it."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # CLIP's order: the bytes, the bytes that end a word, the merges, the two special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", show_progress=False)
    words = (caption.replace(" ", "\n") for caption in captions)
    bpe.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    bpe.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_LENGTH,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": EOS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ 2M, Hybrid-SD's choice."""
    return DPMSolverMultistepScheduler.from_config(SCHEDULER)


def one_step_scheduler() -> DDIMScheduler:
    """From t = 999 to the clean latent itself in one step, as the one-step model was trained."""
    return DDIMScheduler.from_config({**SCHEDULER, "timestep_spacing": "trailing", "set_alpha_to_one": True})
