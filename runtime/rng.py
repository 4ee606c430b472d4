"""PyTorch's noise in numpy: what `torch.randn` draws from a seeded generator, on the CPU or on a CUDA device.

Contiguous float32 draws with mean 0 and deviation 1 are covered; other dtypes and distributions are not. A seed is any
integer that `torch.Generator.manual_seed` takes, -2**63 to 2**64 - 1; a negative seed `s` means `s + 2**64`. The CPU
generator uses the low 32 bits alone, so seeds that are equal modulo 2**32 give the same noise there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, SupportsIndex

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError, RequestError

__all__ = ["CpuGenerator", "Generator", "PhiloxGenerator", "new_generator", "philox4x32_10"]

FloatArray = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
LongWords = npt.NDArray[np.uint64]
Float64 = npt.NDArray[np.float64]

SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1

_FILL_WIDTH = 16
_TWO_PI_F32 = np.float32(2 * np.pi)

_BLOCK_THREADS = 256
_LANES = 4
_PHILOX_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW_WORD = np.uint64(0xFFFFFFFF)
_HIGH_SHIFT = np.uint64(32)
# Enough values to pay for numpy's calls, few enough for the working arrays to stay in the processor's cache.
_CHUNK = 4096
# Above this torch splits the tensor into several launches, each with a grid and an offset of its own.
_CUDA_MAX_COUNT = 2**29


class Generator(Protocol):
    """A seeded source of standard normal noise; each call goes on where the last one stopped.

    One generator serves one thread. For a batch with one seed an image, hold one generator an image and draw each
    image's noise from its own, as diffusers' `randn_tensor` does with a list of generators.
    """

    def randn(self, shape: Sequence[int]) -> FloatArray:
        """Draw standard normals: `shape` float32, C-contiguous, new.

        Raises:
            RequestError: a dimension is negative or no integer, or the generator cannot draw that many values.
        """

    def fill(self, out: FloatArray) -> None:
        """Draw what `randn` would for the shape of `out` into it, float32 and C-contiguous; allocates nothing large.

        Raises:
            ArgumentError: it is not C-contiguous.
            RequestError: the generator cannot draw that many values.
        """


def new_generator(seed: SupportsIndex, device: Literal["cpu", "cuda"] = "cpu") -> Generator:
    """Return what `torch.Generator(device).manual_seed(seed)` is in PyTorch.

    `cuda` stands for the default GPU of `PhiloxGenerator`; construct that class for another one.

    Raises:
        RequestError: the seed is no integer from -2**63 to 2**64 - 1.
        ArgumentError: the device is neither `cpu` nor `cuda`.
    """
    if device == "cpu":
        return CpuGenerator(seed)
    if device == "cuda":
        return PhiloxGenerator(seed)
    raise ArgumentError("noise generator", "unknown device", got=device, expected="'cpu' or 'cuda'")


class CpuGenerator:
    """`torch.Generator("cpu")` with `torch.randn(shape, generator=g)` in float32.

    Source: PyTorch 2.13, `ATen/core/MT19937RNGEngine.h`, `ATen/core/DistributionsHelper.h` (`normal_distribution`) and
    `ATen/native/cpu/DistributionTemplates.h` (`normal_fill`). Largest difference from torch 2.13 over ten million
    values: 4.8e-7 where torch runs its AVX2 kernel (x86-64 from 2013 on), 2.3e-6 where it runs the scalar one, which
    rounds the angle otherwise (ARM, or `ATEN_CPU_CAPABILITY=default`); none for draws of fewer than 16 values.
    """

    def __init__(self, seed: SupportsIndex) -> None:
        """Seed the generator.

        Raises:
            RequestError: the seed is no integer from -2**63 to 2**64 - 1.
        """
        # RandomState's stream is frozen by NumPy's policy (NEP 19), and its seeding is the one torch uses.
        self._engine = np.random.RandomState(_unsigned_seed(seed) & 0xFFFFFFFF)
        self._unread_normal = np.empty(0, np.float64)
        self._box_muller = _BoxMuller()

    def randn(self, shape: Sequence[int]) -> FloatArray:
        """Draw standard normals: `shape` float32, C-contiguous, new.

        Raises:
            RequestError: a dimension is negative or no integer.
        """
        normals = np.empty(_checked_shape(shape), np.float32)
        self.fill(normals)
        return normals

    def fill(self, out: FloatArray) -> None:
        """See `Generator.fill`."""
        values = _flat(out)
        if values.size < _FILL_WIDTH:
            values[...] = self._serial_normals(values.size)
        else:
            self._fill_normals(values)

    def _words(self, count: int) -> Words:
        return self._engine.randint(0, 2**32, size=count, dtype=np.uint32)

    def _serial_normals(self, count: int) -> FloatArray:
        """Fewer than 16 values: Box-Muller in float64, two values a time, the unread one kept for a later such call."""
        pairs = max(0, count - self._unread_normal.size + 1) // 2
        words = self._words(4 * pairs).astype(np.uint64).reshape(pairs, 2, 2)
        uniforms = ((words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64(2**53 - 1)) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log1p(-uniforms[:, 1])), 2 * np.pi * uniforms[:, 0]
        drawn = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
        normals = np.concatenate([self._unread_normal, drawn])
        self._unread_normal = normals[count:]
        return normals[:count].astype(np.float32)

    def _fill_normals(self, values: FloatArray) -> None:
        """16 values or more: whole groups of 16, then the last 16 once more from new words if a group is left over."""
        left = values.size % _FILL_WIDTH
        for first in range(0, values.size - left, _CHUNK):
            chunk = values[first : min(first + _CHUNK, values.size - left)]
            self._box_muller.fill(self._words(chunk.size), chunk)
        if left:
            self._words(left)  # torch draws them, for values that the last group then has anew
            self._box_muller.fill(self._words(_FILL_WIDTH), values[-_FILL_WIDTH:])


class _BoxMuller:
    """Normals of words, each group of 16 pairing its first eight with its last eight.

    The angle is rounded to float32 where torch's AVX2 kernel rounds it; the rest is float64, so that the result does
    not depend on the accuracy of numpy's float32 functions on this processor.
    """

    def __init__(self) -> None:
        self._uniforms = np.empty(_CHUNK, np.float32)
        self._radius, self._angle, self._turned = np.empty((3, _CHUNK // 2), np.float64)

    def fill(self, words: Words, out: FloatArray) -> None:
        """Write the normals of `words`, 16 n of them up to a chunk, to `out`; the words are overwritten."""
        half = out.size // 2
        radius, angle, turned = self._radius[:half], self._angle[:half], self._turned[:half]
        uniforms = self._uniforms[: out.size]
        np.bitwise_and(words, np.uint32(0xFFFFFF), out=words)
        np.multiply(words, np.float32(2.0**-24), out=uniforms, dtype=np.float32, casting="same_kind")
        first, second = np.moveaxis(uniforms.reshape(-1, 2, _FILL_WIDTH // 2), 1, 0)
        np.subtract(1, first, out=radius.reshape(first.shape), dtype=np.float64)
        np.log(radius, out=radius)
        np.multiply(radius, -2, out=radius)
        np.sqrt(radius, out=radius)
        np.multiply(second, _TWO_PI_F32, out=second)
        angle.reshape(second.shape)[...] = second
        cosines, sines = np.moveaxis(out.reshape(-1, 2, _FILL_WIDTH // 2), 1, 0)
        for turn, normals in ((np.cos, cosines), (np.sin, sines)):
            turn(angle, out=turned)
            np.multiply(radius, turned, out=turned)
            normals[...] = turned.reshape(normals.shape)


class PhiloxGenerator:
    """`torch.Generator("cuda")` with `torch.randn(shape, generator=g, device="cuda")` in float32.

    Philox4x32-10 keyed by the 64-bit seed. Thread `t` of the launch draws from the counter (block, t), four words a
    block, through cuRAND's `curand_normal4`; lane `i` of pass `p` is element `(4 p + i) T + t`, where `T` is the number
    of threads launched, and each pass moves the generator on by one block. `T` covers the tensor up to the most that
    the GPU holds at once: `multiprocessors * (threads_per_multiprocessor // 256) * 256`. Draws of no more values than
    that are the same on every GPU; larger ones differ from one GPU model to the next. The default, an A100, holds
    221,184 threads; others: H100 SXM 132 x 2048, RTX 4090 128 x 1536, RTX 3060 28 x 1536, T4 40 x 1024 (40,960, less
    than a 1024-pixel SDXL latent).

    Established: the cipher, by Random123's known-answer vectors; seeding, lanes, passes and the advance between calls,
    from the source and by values that users of an RTX A4000, an A100, an H100 and unnamed GPUs published
    (`tests/runtime/goldens/torch_cuda_randn.json`); the 196 of full precision among them agree to 1e-6. Not
    measured: the largest difference on a GPU. It comes from `__sincosf`, whose error (NVIDIA's manuals: 2**-21.41 up
    to pi, more beyond, unbounded there) is multiplied by a radius of up to 6.8; the `gpu` test allows 5e-6.

    Source: PyTorch 2.13, `ATen/native/cuda/DistributionTemplates.h` (`calc_execution_policy`,
    `distribution_elementwise_grid_stride_kernel`); cuRAND's device API (`curand_init`, `curand_normal4`); Salmon et
    al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """

    def __init__(
        self, seed: SupportsIndex, *, multiprocessors: int = 108, threads_per_multiprocessor: int = 2048
    ) -> None:
        """Seed the generator for a GPU of `multiprocessors`, each holding `threads_per_multiprocessor` threads.

        torch.cuda.get_device_properties names them `multi_processor_count` and `max_threads_per_multi_processor`.

        Raises:
            RequestError: the seed is no integer from -2**63 to 2**64 - 1.
            ArgumentError: the GPU holds not even one block of 256 threads.
        """
        key = _unsigned_seed(seed)
        self._key = (key & 0xFFFFFFFF, key >> 32)
        self._max_threads = multiprocessors * (threads_per_multiprocessor // _BLOCK_THREADS) * _BLOCK_THREADS
        self._block = 0
        self._steps = np.arange(_CHUNK, dtype=np.uint64)
        self._words, self._products = np.empty((4, _CHUNK), np.uint64), np.empty((2, _CHUNK), np.uint64)
        self._reals, self._rounded = np.empty((3, _CHUNK), np.float64), np.empty(_CHUNK, np.float32)
        if min(multiprocessors, self._max_threads) < 1:
            raise ArgumentError(
                "noise generator",
                "a GPU that holds no block of threads",
                got=(multiprocessors, threads_per_multiprocessor),
                expected=f"multiprocessors >= 1 and threads_per_multiprocessor >= {_BLOCK_THREADS}",
            )

    def randn(self, shape: Sequence[int]) -> FloatArray:
        """Draw standard normals: `shape` float32, C-contiguous, new.

        Raises:
            RequestError: a dimension is negative or no integer, or there are more than 2**29 values.
        """
        sizes = _checked_shape(shape)
        _require_one_launch(sizes)  # before so much is allocated
        normals = np.empty(sizes, np.float32)
        self.fill(normals)
        return normals

    def fill(self, out: FloatArray) -> None:
        """See `Generator.fill`."""
        _require_one_launch(out.shape)
        normals, count = _flat(out), out.size
        threads = min(self._max_threads, -(-count // _BLOCK_THREADS) * _BLOCK_THREADS)
        passes = -(-count // (_LANES * threads)) if count else 0
        for index in range(passes):
            self._fill_lanes(normals[index * _LANES * threads : (index + 1) * _LANES * threads], threads)
            self._block += 1

    def _fill_lanes(self, lanes: FloatArray, threads: int) -> None:
        """Write one pass of `threads` threads into `lanes`: up to four runs, one a lane, the last one cut short."""
        for first in range(0, min(threads, lanes.size), _CHUNK):
            last = min(first + _CHUNK, threads, lanes.size)
            for lane, values in enumerate(self._normals(first, last, -(-(lanes.size - first) // threads))):
                run = lanes[lane * threads + first : lane * threads + last]
                run[:] = values[: run.size]

    def _normals(self, first: int, last: int, lanes: int) -> Iterator[Float64]:
        """The first `lanes` (1 to 4) of the four normals that `curand_normal4` makes for threads `first` to `last`."""
        words, products = self._words[:, : last - first], self._products[:, : last - first]
        uniform, angle, turned = self._reals[:, : last - first]
        words[0], words[1], words[3] = self._block & 0xFFFFFFFF, self._block >> 32, 0
        np.add(self._steps[: last - first], np.uint64(first), out=words[2])
        _encrypt(words, self._key, products)
        turn = float(np.float32(2.0**-32) * _TWO_PI_F32)
        # cuRAND computes in float32 with fused multiply-adds; float64 rounded once to float32 is the same.
        rounded = self._rounded[: last - first]
        for pair in range(-(-lanes // 2)):
            for word, made, scale in zip(
                words[2 * pair : 2 * pair + 2], (uniform, angle), (2.0**-32, turn), strict=True
            ):
                rounded[...] = word
                np.multiply(rounded, scale, out=made, dtype=np.float64)
                np.add(made, scale / 2, out=made)
                rounded[...] = made
                made[...] = rounded
            np.log(uniform, out=uniform)
            np.multiply(uniform, -2, out=uniform)
            np.sqrt(uniform, out=uniform)
            yield np.multiply(uniform, np.sin(angle, out=turned), out=turned)
            if 2 * pair + 1 < lanes:
                yield np.multiply(uniform, np.cos(angle, out=turned), out=turned)


def philox4x32_10(counter: Words, key: tuple[int, int]) -> Words:
    """Encrypt counters with Philox4x32, ten rounds: `counter` (4, n) uint32 and two 32-bit words of key to (4, n).

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """
    words = counter.astype(np.uint64)
    _encrypt(words, key, np.empty_like(words[:2]))
    return words.astype(np.uint32)


def _encrypt(words: LongWords, key: tuple[int, int], products: LongWords) -> None:
    """`philox4x32_10` in place: `words` (4, n), of which 32 bits each count; `products` (2, n) is overwritten."""
    k0, k1 = key
    for _ in range(10):
        np.multiply(words[::2], _PHILOX_MULTIPLIERS, out=products)
        for high, low, product, k in ((words[0], words[1], products[1], k0), (words[2], words[3], products[0], k1)):
            np.right_shift(product, _HIGH_SHIFT, out=high)
            np.bitwise_xor(high, low, out=high)
            np.bitwise_xor(high, np.uint64(k), out=high)
            np.bitwise_and(product, _LOW_WORD, out=low)
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _PHILOX_KEY_STEPS[1]) & 0xFFFFFFFF


def _unsigned_seed(seed: SupportsIndex) -> int:
    """The 64 bits that torch takes the seed for."""
    expected = "an integer from -2**63 to 2**64 - 1"
    try:
        value = operator.index(seed)
    except TypeError:
        raise RequestError("seed", "not an integer", got=seed, expected=expected) from None
    if isinstance(seed, bool):
        raise RequestError("seed", "a truth value", got=seed, expected=expected)
    if not SEED_MIN <= value <= SEED_MAX:
        # Python refuses to print an integer of thousands of digits.
        got: object = value if value.bit_length() <= 256 else f"{value.bit_length()}-bit integer"
        remedy = "torch.Generator.manual_seed takes no other either: take it modulo 2**64."
        raise RequestError("seed", "out of range", got=got, expected=expected, remedy=remedy)
    return value % 2**64


def _flat(out: FloatArray) -> FloatArray:
    """A view of all values in their order."""
    if not out.flags.c_contiguous:
        raise ArgumentError("noise", "an array to fill that is not C-contiguous", got=out.strides)
    return out.reshape(-1)


def _require_one_launch(sizes: tuple[int, ...]) -> None:
    if math.prod(sizes) > _CUDA_MAX_COUNT:
        raise RequestError(
            "noise shape",
            "more values than one CUDA launch fills",
            got=sizes,
            expected=f"at most {_CUDA_MAX_COUNT} values",
            remedy="Draw the noise in several calls.",
        )


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise RequestError("noise shape", "not a sequence of integers", got=shape, expected="sizes >= 0") from None
    if any(size < 0 for size in sizes):
        raise RequestError("noise shape", "a negative size", got=sizes, expected="sizes >= 0")
    return sizes
