"""Pictures of every mode that callers give: taken as what they show, or refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tandemrt.runtime import RequestError
from tandemrt.runtime.pictures_in import colour_pixels, mask_pixels

COLOURS = (204, 51, 0)  # which the web palette has
SIZE = (16, 16)


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"])
def test_pictures_of_8_bits_are_read_as_their_colours(mode: str) -> None:
    flat = Image.new("RGB", (8, 8), COLOURS)
    given = flat.convert("P").convert("PA") if mode == "PA" else flat.convert(mode)
    expected = np.asarray(given.convert("RGB"), np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    for size in ((8, 8), SIZE):
        pixels = colour_pixels("image", given, size)
        assert pixels.shape == (1, 3, *size)
        if mode != "1":  # which dithers
            np.testing.assert_allclose(pixels, np.broadcast_to(expected[..., :1, :1], pixels.shape), atol=2 / 255)
    np.testing.assert_allclose(colour_pixels("image", given, (8, 8)), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_pictures_of_16_bits_keep_them(mode: str) -> None:
    depth = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    raw = depth.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    given = Image.frombytes(mode, (8, 8), raw)
    pixels = colour_pixels("control_image", given, (8, 8))
    for channel in pixels[0]:
        np.testing.assert_allclose(channel, depth / 65535, atol=1e-6)
    np.testing.assert_array_equal(mask_pixels("mask_image", given, (8, 8))[0, 0], depth >= 32768)
    resized = colour_pixels("control_image", given, SIZE)
    assert resized.min() >= 0
    assert resized.max() <= 1
    assert np.unique(resized).size > 64


@pytest.mark.parametrize("mode", ["I", "F", "HSV", "LAB"])
def test_other_modes_are_refused(mode: str) -> None:
    for read in (colour_pixels, mask_pixels):
        with pytest.raises(RequestError, match=f"image: mode of the image, got '{mode}', .*Convert it to 8 bits"):
            read("image", Image.new(mode, (8, 8)), (8, 8))


@pytest.mark.parametrize("size", [(8, 8), (64, 64)])
def test_an_image_that_cannot_be_read_to_its_end_is_refused(size: tuple[int, int]) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "PNG")
    cut = Image.open(io.BytesIO(stream.getvalue()[:4000]))
    with pytest.raises(RequestError, match="image: the image cannot be read"):
        colour_pixels("image", cut, size)


def test_truth_values_are_a_mask_and_no_picture() -> None:
    assert mask_pixels("mask_image", np.ones((8, 8), np.bool_), (8, 8)).all()
    with pytest.raises(RequestError, match=r"image: type, got dtype.'bool'"):
        colour_pixels("image", np.ones((8, 8, 3), np.bool_), (8, 8))
