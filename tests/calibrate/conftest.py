"""Models that several files' tests measure with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tandemrt.runtime.cli import main

from ..runtime.tiny_bundle import write_tiny_bundle
from .collecting import PROMPTS, STEPS, Collect


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of what runs in a test: empty, and not the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TANDEMRT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two denoisers that is only read."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def collect(tiny_bundle: Path, tmp_path: Path) -> Collect:
    """Runs `tandemrt calibrate collect`; further arguments come last, so that they win."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def collected(*arguments: object, out: str = "out", of: Path = tiny_bundle) -> int:
        given = ("--prompts", prompts, "--steps", STEPS, "--rows", 2, "--threads", 1, "--out", tmp_path / out)
        return main([str(word) for word in ("calibrate", "collect", of, *given, *arguments)])

    return collected


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights as transformers saves one, with a tokenizer of a few words."""
    import torch  # noqa: PLC0415 (seconds)
    from transformers import CLIPConfig, CLIPModel  # noqa: PLC0415 (seconds)

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    texts = {**small, "vocab_size": 8, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=texts, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "red": 2, "blue": 3, "circle": 4, "square": 5, "a": 6, "?": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
