"""The packaged weights are what the recipe publishes: small, half precision, and of the family's architectures."""

import json
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from tandemrt.bench.shapes import family, inheritance, scenes, train
from tandemrt.bench.shapes.publishing import LOG, publish, require_family
from tandemrt.runtime import ArgumentError

WEIGHTS = Path(family.__file__).parent / "weights"
MODELS = {
    "large/unet": family.large_unet,
    "small/unet": lambda: family.pruned_unet(family.SMALL_PRUNING),
    "one_step/unet": lambda: family.pruned_unet(family.ONE_STEP_PRUNING),
    "large/vae": family.kl_vae,
    "vae_small": family.small_vae,
    "vae_tiny": family.tiny_vae,
}


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(WEIGHTS / "large" / "tokenizer")


def test_the_family_is_at_most_25_megabytes():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 25e6


def test_there_is_one_safetensors_file_for_each_model_and_no_other_weights():
    found = {str(path.parent.relative_to(WEIGHTS)) for path in WEIGHTS.rglob("*.safetensors")}
    assert found == {*MODELS, "large/text_encoder"}
    assert not [path for path in WEIGHTS.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl", ".onnx")]


def test_every_tensor_is_half_precision():
    for path in WEIGHTS.rglob("*.safetensors"):
        with path.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        dtypes = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
        # Position numbers are whole numbers in any precision.
        assert dtypes <= {"F16", "I64"}, path
        assert "F16" in dtypes


@pytest.mark.parametrize("name", MODELS)
def test_weights_fit_the_architecture_exactly_and_are_finite(name):
    state = load_file(WEIGHTS / name / "diffusion_pytorch_model.safetensors")
    MODELS[name]().load_state_dict(state, strict=True)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_the_text_encoder_fits_the_tokenizer(tokenizer):
    state = load_file(WEIGHTS / "large" / "text_encoder" / "model.safetensors")
    family.text_encoder(tokenizer).load_state_dict(state, strict=True)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_pruned_models_say_how_they_were_pruned():
    for folder, pruning in (("small", family.SMALL_PRUNING), ("one_step", family.ONE_STEP_PRUNING)):
        config = json.loads((WEIGHTS / folder / "unet" / "config.json").read_text(encoding="utf-8"))
        assert {key: tuple(config[key]) for key in pruning} == pruning


def test_the_tokenizer_knows_every_word_of_a_caption_and_none_is_cut(tokenizer):
    for scene in scenes.scenes(0, 200, "held_out"):
        tokens = tokenizer(scene.caption)["input_ids"]
        assert len(tokens) == len(scene.caption.split()) + 2
        assert len(tokens) <= family.TEXT_LENGTH


def test_a_pruned_model_inherits_the_large_ones_outer_layers_and_its_strongest_channels():
    large, small = family.large_unet(), family.pruned_unet(family.SMALL_PRUNING)
    inheritance.inherit(small, large)
    assert small.conv_in.weight.equal(large.conv_in.weight)
    # One of two layers per block: of three upward ones the first and the last are kept.
    last, origin = small.up_blocks[0].resnets[1], large.up_blocks[0].resnets[2]
    score = origin.conv1.weight.abs().sum((1, 2, 3)) * origin.conv2.weight.abs().sum((0, 2, 3))
    kept = score.topk(last.conv1.out_channels).indices.sort().values
    assert last.conv1.weight.equal(origin.conv1.weight[kept])
    assert last.conv2.weight.equal(origin.conv2.weight[:, kept])


def test_publishing_what_is_published_changes_no_weight_and_no_log(tmp_path):
    trainer = train.Trainer(tmp_path / "work", train.Budget())
    for stage in train.STAGES:
        trainer.adopt(stage, WEIGHTS)
    publish(trainer, tmp_path / "out")
    log, again = ((folder / LOG).read_text(encoding="utf-8").splitlines() for folder in (WEIGHTS, tmp_path / "out"))
    assert sorted(again) == sorted(log)
    for path in WEIGHTS.rglob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "out" / path.relative_to(WEIGHTS))
        assert before.keys() == after.keys()
        assert all(tensor.equal(after[name]) for name, tensor in before.items())
    for path in WEIGHTS.rglob("scheduler_config.json"):
        before, after = (json.loads(one.read_bytes()) for one in (path, tmp_path / "out" / path.relative_to(WEIGHTS)))
        assert {**before, "_diffusers_version": ""} == {**after, "_diffusers_version": ""}


def test_publishing_over_something_else_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine", encoding="utf-8")
    trainer = train.Trainer(tmp_path / "work", train.Budget())
    with pytest.raises(ArgumentError, match="no trained family"):
        publish(trainer, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_a_killed_publishing_is_mended_and_repeated(tmp_path):
    trainer = train.Trainer(tmp_path / "work", train.Budget())
    for stage in train.STAGES:
        trainer.adopt(stage, WEIGHTS)
    publish(trainer, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.old")
    require_family(tmp_path / "out")
    assert (tmp_path / "out" / LOG).is_file()
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / LOG).touch()
    publish(trainer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]


def test_weights_that_are_not_there_are_not_adopted(tmp_path):
    trainer = train.Trainer(tmp_path / "work", train.Budget())
    with pytest.raises(ArgumentError, match="no published weights of small"):
        trainer.adopt("small", tmp_path)


def test_the_budget_is_the_one_of_the_published_weights():
    budget, done = train.Budget(), {}
    for line in (WEIGHTS / LOG).read_text(encoding="utf-8").splitlines():
        facts = json.loads(line)
        if "step" in facts:
            assert facts["step"] == done.get(facts["stage"], 0) + 100, "one run a stage"
            done[facts["stage"]] = facts["step"]
        if "pairs" in facts:
            done["pairs"] = facts["pairs"]
    steps = {name: getattr(budget, name) for name in ("vae_tiny", "small", "pairs", "one_step", "vae_kl", "vae_small")}
    # The published tiny autoencoder had its first 4,500 steps on older scenes; see the README beside the script.
    assert done == {**steps, "vae_tiny": 2_000, "large": budget.large_even + budget.large_weighted}


def test_stages_of_another_budget_are_not_gone_on_from(tmp_path):
    train.Trainer(tmp_path / "work", train.Budget())
    train.Trainer(tmp_path / "work", train.Budget())
    with pytest.raises(ArgumentError, match="another budget"):
        train.Trainer(tmp_path / "work", train.Budget(small=1))
