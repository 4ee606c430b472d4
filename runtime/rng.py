"""PyTorch's noise in numpy: what `torch.randn` draws from a seeded generator, on the CPU or on a CUDA device.

Contiguous float32 draws with mean 0 and deviation 1 are covered; other dtypes and distributions are not. A seed is any
integer that `torch.Generator.manual_seed` takes, -2**63 to 2**64 - 1; a negative seed `s` means `s + 2**64`. The CPU
generator uses the low 32 bits alone, so seeds that are equal modulo 2**32 give the same noise there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal, Protocol, SupportsIndex

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError, RequestError

__all__ = ["CpuGenerator", "Generator", "PhiloxGenerator", "new_generator", "philox4x32_10"]

FloatArray = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]

SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1

_FILL_WIDTH = 16
_TWO_PI_F32 = np.float32(2 * np.pi)

_BLOCK_THREADS = 256
_LANES = 4
_PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW_WORD = np.uint64(0xFFFFFFFF)
_HIGH_SHIFT = np.uint64(32)
# Enough threads to pay for numpy's calls, few enough for the working arrays to stay in the processor's cache.
_PHILOX_CHUNK = 8192
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

    def randn(self, shape: Sequence[int]) -> FloatArray:
        """Draw standard normals: `shape` float32, C-contiguous, new.

        Raises:
            RequestError: a dimension is negative or no integer.
        """
        sizes = _checked_shape(shape)
        count = math.prod(sizes)
        values = self._serial_normals(count) if count < _FILL_WIDTH else self._filled_normals(count)
        return values.reshape(sizes)

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

    def _filled_normals(self, count: int) -> FloatArray:
        """16 values or more: whole groups of 16, then the last 16 once more from new words if a group is left over."""
        whole = count - count % _FILL_WIDTH
        normals = np.empty(count, np.float32)
        normals[:whole] = _box_muller_fill(self._words(count)[:whole])
        if whole < count:
            normals[-_FILL_WIDTH:] = _box_muller_fill(self._words(_FILL_WIDTH))
        return normals


def _box_muller_fill(words: Words) -> FloatArray:
    """Normals of `words` (16 n) uint32, each group of 16 pairing its first eight with its last eight.

    The angle is rounded to float32 where torch's AVX2 kernel rounds it; the rest is float64, so that the result does
    not depend on the accuracy of numpy's float32 functions on this processor.
    """
    uniforms = (
        ((words & np.uint32(0xFFFFFF)) * np.float32(2.0**-24)).astype(np.float32).reshape(-1, 2, _FILL_WIDTH // 2)
    )
    radius = np.sqrt(-2 * np.log(1 - uniforms[:, 0].astype(np.float64)))
    angle = (uniforms[:, 1] * _TWO_PI_F32).astype(np.float64)
    normals = np.empty(uniforms.shape, np.float32)
    normals[:, 0] = radius * np.cos(angle)
    normals[:, 1] = radius * np.sin(angle)
    return normals.ravel()


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
        count = math.prod(sizes)
        if count > _CUDA_MAX_COUNT:
            raise RequestError(
                "noise shape",
                "more values than one CUDA launch fills",
                got=sizes,
                expected=f"at most {_CUDA_MAX_COUNT} values",
                remedy="Draw the noise in several calls.",
            )
        threads = min(self._max_threads, -(-count // _BLOCK_THREADS) * _BLOCK_THREADS)
        passes = -(-count // (_LANES * threads)) if count else 0
        normals = np.empty(count, np.float32)
        for index in range(passes):
            lanes = normals[index * _LANES * threads : (index + 1) * _LANES * threads]
            _fill_lanes(lanes, threads, self._block + index, self._key)
        self._block += passes
        return normals.reshape(sizes)


def _fill_lanes(lanes: FloatArray, threads: int, block: int, key: tuple[int, int]) -> None:
    """Write one pass of `threads` threads into `lanes`: up to four runs, one a lane, the last one cut short."""
    for first in range(0, min(threads, lanes.size), _PHILOX_CHUNK):
        last = min(first + _PHILOX_CHUNK, threads, lanes.size)
        counter = np.zeros((4, last - first), np.uint32)
        counter[0], counter[1] = block & 0xFFFFFFFF, block >> 32
        counter[2] = np.arange(first, last)
        words = philox4x32_10(counter, key)
        for lane, values in enumerate(_curand_normals(words, -(-(lanes.size - first) // threads))):
            run = lanes[lane * threads + first : lane * threads + last]
            run[:] = values[: run.size]


def _curand_normals(words: Words, lanes: int) -> list[npt.NDArray[np.float64]]:
    """The first `lanes` (1 to 4) of the four normals that `curand_normal4` makes of `words` (4, n) uint32."""
    turn = float(np.float32(2.0**-32) * _TWO_PI_F32)
    normals: list[npt.NDArray[np.float64]] = []
    for pair in range(-(-lanes // 2)):
        # cuRAND computes in float32 with fused multiply-adds; float64 rounded once to float32 is the same.
        uniforms = words[2 * pair : 2 * pair + 2].astype(np.float32).astype(np.float64)
        uniform = (uniforms[0] * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
        angle = (uniforms[1] * turn + turn / 2).astype(np.float32).astype(np.float64)
        radius = np.sqrt(-2 * np.log(uniform))
        normals.append(radius * np.sin(angle))
        if 2 * pair + 1 < lanes:
            normals.append(radius * np.cos(angle))
    return normals


def philox4x32_10(counter: Words, key: tuple[int, int]) -> Words:
    """Encrypt counters with Philox4x32, ten rounds: `counter` (4, n) uint32 and two 32-bit words of key to (4, n).

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HIGH_SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW_WORD,
            (product0 >> _HIGH_SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW_WORD,
        )
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _PHILOX_KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


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


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise RequestError("noise shape", "not a sequence of integers", got=shape, expected="sizes >= 0") from None
    if any(size < 0 for size in sizes):
        raise RequestError("noise shape", "a negative size", got=sizes, expected="sizes >= 0")
    return sizes
