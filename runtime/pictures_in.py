"""Pictures and masks that callers give, as arrays of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import RequestError

Float32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Picture: TypeAlias = Image.Image | Array
Pictures: TypeAlias = Picture | Sequence[Picture]
Size = tuple[int, int]

_MODES = ("1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_COLOURS = "a PIL image, or an array (height, width, 3) of uint8 or of float32 in 0..1, or a list of these"
_MASKS = "a PIL image, or an array (height, width) of bool, of uint8 or of float32 in 0..1, or a list of these"


def picture_size(name: str, given: Pictures) -> Size:
    """Height and width of the first picture; raises RequestError when there is none."""
    return _size(_listed(name, given, 3, _COLOURS)[0])


def colour_pixels(name: str, given: Pictures, size: Size) -> Float32:
    """Pictures as (N, 3, height, width) float32 in [0, 1]; PIL images are resized to `size` as diffusers does it.

    Those of modes P, PA and 1 are resized after their conversion, unlike diffusers; those of 16 bits keep them.

    Raises:
        RequestError: what is given is no picture, or an array of another size.
    """
    pixels = _pixels(name, _listed(name, given, 3, _COLOURS), size, "RGB")
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def mask_pixels(name: str, given: Pictures, size: Size) -> Float32:
    """Masks as (N, 1, height, width) float32, 1 from half brightness on and 0 below; PIL images are resized to `size`.

    Raises:
        RequestError: what is given is no mask, or an array of another size.
    """
    pixels = _pixels(name, _listed(name, given, 2, _MASKS), size, "L")
    return (pixels[:, None] >= 0.5).astype(np.float32)


def _listed(name: str, given: object, dimensions: int, expected: str) -> tuple[Picture, ...]:
    """One picture or several as a tuple; each array has `dimensions`, a picture's last being its colours."""
    if isinstance(given, Image.Image) or (isinstance(given, np.ndarray) and given.ndim == dimensions):
        pictures: tuple[Any, ...] = (given,)
    elif isinstance(given, list | tuple) or (isinstance(given, np.ndarray) and given.ndim == dimensions + 1):
        pictures = tuple(given)
    else:
        got = given.shape if isinstance(given, np.ndarray) else type(given).__name__
        raise RequestError(name, "no picture", got=got, expected=expected)
    for picture in pictures:
        if isinstance(picture, Image.Image) and min(picture.size) > 0:
            continue
        array = picture if isinstance(picture, np.ndarray) else None
        if array is None or array.ndim != dimensions or not array.size or (dimensions == 3 and array.shape[2] != 3):
            got = type(picture).__name__ if array is None else array.shape
            raise RequestError(name, "no picture", got=got, expected=expected)
    if not pictures:
        raise RequestError(name, "an empty list", expected="at least one picture")
    return pictures


def _size(picture: Picture) -> Size:
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return picture.shape[0], picture.shape[1]


def _pixels(name: str, pictures: Sequence[Picture], size: Size, mode: Literal["RGB", "L"]) -> Float32:
    return np.stack([_scaled(name, _resized(name, picture, size, mode)) for picture in pictures])


def _resized(name: str, picture: Picture, size: Size, mode: Literal["RGB", "L"]) -> Array:
    if isinstance(picture, Image.Image):
        try:
            return _pixels_of_image(name, picture, size, mode)
        except (OSError, ValueError, SyntaxError) as error:
            raise RequestError(name, f"the image cannot be read ({error})", remedy="Save it again.") from error
    if _size(picture) != size:
        remedy = "Resize it, or give a PIL image, which is resized."
        raise RequestError(name, "height and width", got=_size(picture), expected=str(size), remedy=remedy)
    return picture


def _pixels_of_image(name: str, image: Image.Image, size: Size, mode: Literal["RGB", "L"]) -> Array:
    """An image's 8-bit pixels, or those of 16 bits in [0, 1], in colours or, for L, in grey."""
    image.load()
    deep = image.mode.startswith("I;16")
    if deep:
        # Pillow's own conversion to 8 bits cuts off what is brighter than 255.
        image = Image.fromarray(np.asarray(image).astype(np.float32) / np.float32(65535))
    elif image.mode not in _MODES:
        expected = f"one of {', '.join(_MODES)}, I;16"
        raise RequestError(name, "mode of the image", got=image.mode, expected=expected, remedy="Convert it to 8 bits.")
    elif image.mode in ("P", "PA", "1"):
        # Colours of a palette have no values in between.
        image = image.convert(mode)
    if _size(image) != size:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    if not deep:
        return np.asarray(image.convert(mode))
    grey: Array = np.clip(np.asarray(image), 0, 1)
    return grey if mode == "L" else grey[..., None].repeat(3, axis=2)


def _scaled(name: str, array: Array) -> Float32:
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / np.float32(255)
    if array.dtype != np.float32 and not (array.dtype == np.bool_ and array.ndim == 2):
        raise RequestError(name, "type", got=array.dtype, expected="uint8, or float32 in 0..1; bool for a mask")
    pixels: Float32 = array.astype(np.float32)
    # Also false where a value is NaN.
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise RequestError(name, "values", got=f"{pixels.min():g}..{pixels.max():g}", expected="float32 in 0..1")
    return pixels
