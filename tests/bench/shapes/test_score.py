"""The score table from a real bundle, on a tiny number of prompts."""

import json
import shutil

import numpy as np
import pytest

from tandemrt.bench.shapes import accuracy, score
from tandemrt.bench.shapes.bundle import ensure_bundle, expected_digests, export_plan, is_current
from tandemrt.bench.shapes.decoders import encoded
from tandemrt.bench.shapes.scenes import render, scenes
from tandemrt.export import bundle as export
from tandemrt.runtime import Pipeline

DECODERS = ["vae_decoder", "vae_decoder_small", "vae_decoder_tiny"]


@pytest.fixture(scope="module")
def facts(shapes_bundle):
    with Pipeline.open(shapes_bundle, threads=1) as pipeline:
        return score.score(pipeline, prompts=3, batch=3)


@pytest.mark.slow
def test_the_table_has_every_way_and_every_decoder(facts):
    assert [row["plan"] for row in facts["plans"]] == [way.name for way in accuracy.WAYS]
    assert [row["decoder"] for row in facts["decoders"]] == DECODERS
    assert {row["all_right"]["trials"] for row in (*facts["plans"], *facts["decoders"])} == {3}
    assert all(row["latency_ms"]["count"] == 3 for row in facts["decoders"])
    assert all(row["psnr_db"] > 0 for row in facts["decoders"])


@pytest.mark.slow
def test_the_checker_is_checked_in_the_same_table(facts):
    assert facts["checker"]["real_renders"]["all_right"]["share"] == 1.0
    assert facts["checker"]["one_wrong_attribute"]["accepted"]["share"] == 0.0


@pytest.mark.slow
def test_the_facts_are_json_and_name_hardware_versions_and_bundle(facts):
    again = json.loads(json.dumps(facts, allow_nan=False))
    assert again["machine"]["versions"]["onnxruntime"]
    assert again["machine"]["cores"] >= 1
    assert len(again["bundle"]["digest"]) == 64


@pytest.mark.slow
def test_the_markdown_has_a_line_for_each_row(facts):
    table = score.markdown(facts)
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert [name for name in lines if name in {way.name for way in accuracy.WAYS}] == [w.name for w in accuracy.WAYS]
    assert [name for name in lines if name in DECODERS] == DECODERS
    assert "real renders through the checker" in lines
    assert "renders with one wrong attribute, accepted" in lines
    assert facts["machine"]["processor"] in table


def test_the_command_writes_json_and_markdown(shapes_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "WAYS", (accuracy.ONE_STEP,))
    path = tmp_path / "scores" / "score.json"
    score.main(["--bundle", str(shapes_bundle), "--prompts", "2", "--json", str(path), "--threads", "1"])
    assert json.loads(path.read_text(encoding="utf-8"))["prompts"]["count"] == 2
    assert path.with_suffix(".md").read_text(encoding="utf-8") in capsys.readouterr().out


def test_pictures_are_encoded_into_the_latent_space(shapes_bundle):
    pictures = np.stack([render(scene) for scene in scenes(0, 2, "held_out")])
    with Pipeline.open(shapes_bundle, threads=1) as pipeline:
        latents = encoded(pipeline, pictures)
        alone = encoded(pipeline, pictures[1:])
    assert latents.shape == (2, 4, 8, 8)
    assert np.array_equal(latents[1:], alone)
    assert not np.array_equal(latents[0], latents[1])


def test_a_bundle_is_current_only_for_the_weights_it_was_made_from(shapes_bundle, tmp_path):
    digests = expected_digests(export_plan(tmp_path / "bundle"))
    assert is_current(shapes_bundle, digests)
    assert not is_current(shapes_bundle, {**digests, "unet_small": "0" * 64})
    assert not is_current(shapes_bundle, {name: digest for name, digest in digests.items() if name != "unet_small"})
    assert not is_current(tmp_path / "bundle", digests)


def test_a_bundle_is_exported_only_where_none_or_an_outdated_one_is(shapes_bundle, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(export, "export_bundle", lambda plan, _: plans.append(plan))
    assert ensure_bundle(tmp_path / "new") == tmp_path / "new"
    assert ensure_bundle(shapes_bundle) == shapes_bundle
    outdated = tmp_path / "outdated"
    shutil.copytree(shapes_bundle, outdated)
    (outdated / "unet_small" / "model.onnx").write_bytes(b"damaged")
    ensure_bundle(outdated)
    assert [(plan.out, plan.force) for plan in plans] == [(tmp_path / "new", False), (outdated, True)]
