"""Peers that paint another picture than the first contender."""

from __future__ import annotations

import pytest

from tandemrt.bench.contenders import Answer
from tandemrt.bench.peer_pictures import other_pictures
from tandemrt.bench.rounds import Taken

FULL, HALF = "tandemrt onnxruntime:cpu", "tandemrt openvino:cpu:bf16"


def of(
    peer: str, psnr_db: list[float], *, first: str = FULL, precision: str = "float32", otherwise: str = ""
) -> list[str]:
    """What is told of a peer beside the first contender."""
    words = {"precision": precision, "otherwise": otherwise}
    return list(other_pictures({first: Taken(opened=Answer({}, {})), peer: Taken(Answer({}, words), psnr_db=psnr_db)}))


@pytest.mark.parametrize("distances", [[9.5, 9.6, 9.4], [30.0, 34.9, 60.0]])
def test_another_picture_of_the_same_solver_is_told(distances: list[float]) -> None:
    told = (
        f"diffusers paints another picture than {FULL} ({sorted(distances)[1]:.1f} dB): are its weights the bundle's?"
    )
    assert of("diffusers", distances) == [told]


def test_pictures_that_are_near_enough_are_not() -> None:
    assert of("diffusers", [20.0, 35.1, 48.0]) == []
    assert of("diffusers", []) == []


@pytest.mark.parametrize(
    ("peer", "first", "precision"),
    [("diffusers", HALF, "float32"), ("diffusers-bf16", FULL, "bfloat16"), ("sdcpp", FULL, "weights F16")],
)
def test_in_fewer_bits_they_may_be_farther(peer: str, first: str, precision: str) -> None:
    assert of(peer, [31.0], first=first, precision=precision) == []
    assert len(of(peer, [29.0], first=first, precision=precision)) == 1


def test_another_solver_and_our_own_targets_are_told_elsewhere() -> None:
    assert of("openvino-genai", [12.0], otherwise="DDIM in place of DEISMultistep") == []
    assert of("tandemrt openvino:cpu", [12.0]) == []
