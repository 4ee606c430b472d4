"""The generators against torch on the CPU, known answers, values published from GPUs and, where there is one, a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandemrt.runtime import rng
from tandemrt.runtime.errors import ArgumentError, RequestError
from tandemrt.runtime.rng import CpuGenerator, PhiloxGenerator, new_generator, philox4x32_10

SEEDS = st.integers(-(2**63), 2**64 - 1) | st.integers(0, 2**32)
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.integers(0, 200).map(lambda size: (size,))

# torch's scalar kernel rounds the angle in another place than its AVX2 kernel does, and than rng.py does.
VECTOR_ATOL, SCALAR_ATOL = 1e-6, 3e-6
TORCH_CPU_ATOL = SCALAR_ATOL if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else VECTOR_ATOL
CUDA_ATOL = 5e-6

CUDA_RECORDS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "goldens" / "torch_cuda_randn.json").read_text(encoding="utf-8")
)["records"]


def max_difference_from_torch_cpu(seed: int, shapes: list[tuple[int, ...]], ours: CpuGenerator | None = None) -> float:
    """Draw the shapes in order from both generators; the largest difference of a value, 0 if nothing was drawn."""
    generator = ours or CpuGenerator(seed)
    reference = torch.Generator("cpu").manual_seed(seed)
    largest = 0.0
    for shape in shapes:
        expected = torch.randn(shape, generator=reference).numpy()
        got = generator.randn(shape)
        assert got.shape == expected.shape
        assert got.dtype == np.float32
        if expected.size < 16:
            np.testing.assert_array_max_ulp(got, expected, maxulp=1)
        largest = max(largest, float(np.abs(got - expected).max(initial=0)))
    return largest


class TestCpuGenerator:
    @given(SEEDS, st.lists(SHAPES, min_size=1, max_size=8))
    @example(0, [(1,), (16,), (1,), (0,), (3,), (17,), (2, 7), (15,)])
    @example(-1, [()])
    @example(2**64 - 1, [(31,), (5,), (33,)])
    @settings(max_examples=150)
    def test_calls_of_any_size_mixed(self, seed: int, shapes: list[tuple[int, ...]]) -> None:
        assert max_difference_from_torch_cpu(seed, shapes) <= TORCH_CPU_ATOL

    @pytest.mark.parametrize("count", range(40))
    def test_every_small_count_and_what_it_leaves_behind(self, count: int) -> None:
        assert max_difference_from_torch_cpu(7, [(count,), (1,), (count,), (20,)]) <= TORCH_CPU_ATOL

    @pytest.mark.parametrize("shape", [(1, 4, 64, 64), (4, 128, 128), (2, 4, 33, 31), (1, 16, 129, 127)])
    def test_latents(self, shape: tuple[int, ...]) -> None:
        assert max_difference_from_torch_cpu(2024, [shape, shape]) <= TORCH_CPU_ATOL

    def test_another_seed_is_told_apart(self) -> None:
        assert max_difference_from_torch_cpu(7, [(4, 64, 64)], CpuGenerator(8)) > 1

    def test_second_normal_waits_for_the_next_small_call(self) -> None:
        pair = CpuGenerator(3).randn((2,))
        generator = CpuGenerator(3)
        first = generator.randn((1,))
        generator.randn((32,))
        generator.randn((0,))
        np.testing.assert_array_equal([*first, *generator.randn((1,))], pair)

    def test_low_32_bits_make_the_noise(self) -> None:
        seed = 0x0123_4567_89AB_CDEF
        expected = CpuGenerator(seed & 0xFFFFFFFF).randn((40,))
        np.testing.assert_array_equal(CpuGenerator(seed).randn((40,)), expected)
        np.testing.assert_array_equal(CpuGenerator(seed - 2**64 + 2**63).randn((40,)), expected)

    @pytest.mark.slow
    def test_torch_without_vector_instructions(self) -> None:
        program = (
            "import torch\n"
            "print(torch.backends.cpu.get_cpu_capability())\n"
            "print(*torch.randn(65536, generator=torch.Generator().manual_seed(5)).tolist())\n"
        )
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        capability, values = done.stdout.splitlines()
        assert capability == "DEFAULT"
        difference = np.abs(CpuGenerator(5).randn((65536,)) - np.array(values.split(), np.float32))
        assert difference.max() <= SCALAR_ATOL


class CurandThread:
    """One CUDA thread's `curandStatePhilox4_32_10_t`, word by word as cuRAND's headers and Random123 describe it."""

    def __init__(self, seed: int, subsequence: int, offset: int) -> None:
        self.key = seed % 2**32, seed >> 32
        self.counter = (subsequence << 64) + offset // 4

    def normal4(self) -> list[float]:
        x0, x1, x2, x3 = (self.counter >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96))
        k0, k1 = self.key
        for _ in range(10):
            high, low = divmod(x0 * 0xD2511F53, 2**32)
            high2, low2 = divmod(x2 * 0xCD9E8D57, 2**32)
            x0, x1, x2, x3 = high2 ^ x1 ^ k0, low2, high ^ x3 ^ k1, low
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        self.counter += 1
        normals = []
        for x, y in ((x0, x1), (x2, x3)):
            radius = np.sqrt(-2 * np.log(np.float32((float(np.float32(x)) + 0.5) * 2.0**-32), dtype=np.float64))
            angle = np.float64(np.float32((float(np.float32(y)) + 0.5) * 2.0**-32 * float(np.float32(6.2831855))))
            normals += [float(radius * np.sin(angle)), float(radius * np.cos(angle))]
        return normals


def grid_stride_normals(seed: int, offset: int, count: int, grid_limit: int) -> tuple[list[float], int]:
    """torch's distribution kernel as it is written, one thread after another: the values and the next offset."""
    values = [0.0] * count
    block_size, unroll = 256, 4
    stride = block_size * min(grid_limit, -(-count // block_size))
    rounded = ((count - 1) // (stride * unroll) + 1) * stride * unroll
    for thread in range(min(stride, count)):
        state = CurandThread(seed, thread, offset)
        for linear in range(thread, rounded, stride * unroll):
            for lane, normal in enumerate(state.normal4()):
                if linear + stride * lane < count:
                    values[linear + stride * lane] = normal
    return values, offset + rounded // stride


class TestPhiloxGenerator:
    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [
            ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
    )
    def test_random123_known_answers(
        self, counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
    ) -> None:
        """The philox4x32-10 lines of Random123's `tests/kat_vectors`, each in a column among others."""
        counters = np.zeros((4, 3), np.uint32)
        counters[:, 1] = counter
        words = philox4x32_10(counters, key)
        assert words.dtype == np.uint32
        assert tuple(words[:, 1].tolist()) == expected
        assert tuple(words[:, 2].tolist()) != expected or counter == (0, 0, 0, 0)

    @given(
        SEEDS, st.lists(st.integers(0, 1100), min_size=1, max_size=3), st.sampled_from([(1, 256), (1, 700), (3, 256)])
    )
    @example(2**40 + 1, [1100, 0, 1025], (1, 256))
    @example(-5, [15, 1100], (1, 511))
    @settings(max_examples=20)
    def test_calls_of_any_size_against_the_kernel_thread_by_thread(
        self, seed: int, counts: list[int], gpu: tuple[int, int]
    ) -> None:
        generator = PhiloxGenerator(seed, multiprocessors=gpu[0], threads_per_multiprocessor=gpu[1])
        offset = 0
        for count in counts:
            got = generator.randn((count,))
            assert got.dtype == np.float32
            if count:
                expected, offset = grid_stride_normals(seed % 2**64, offset, count, gpu[0] * (gpu[1] // 256))
                np.testing.assert_array_max_ulp(got, np.array(expected, np.float32), maxulp=1)

    @pytest.mark.parametrize("record", CUDA_RECORDS, ids=[record["name"] for record in CUDA_RECORDS])
    def test_values_published_from_gpus(self, record: dict[str, Any]) -> None:
        assert published_difference(record, record["seed"]) <= record["atol"]

    @pytest.mark.parametrize("name", ["rtx_a4000", "launch_of_43008"])
    def test_published_values_tell_seeds_and_gpus_apart(self, name: str) -> None:
        record = next(record for record in CUDA_RECORDS if record["name"] == name)
        assert published_difference(record, record["seed"] + 1) > 1
        assert published_difference({**record, "multiprocessors": record["multiprocessors"] + 1}, record["seed"]) > 1

    def test_all_gpus_agree_up_to_one_launch_of_the_smaller(self) -> None:
        small, large = (PhiloxGenerator(9, multiprocessors=count, threads_per_multiprocessor=1024) for count in (4, 8))
        np.testing.assert_array_equal(small.randn((4, 32, 32)), large.randn((4, 32, 32)))
        assert np.abs(small.randn((8192,)) - large.randn((8192,))).max() > 1

    def test_all_64_bits_make_the_noise(self) -> None:
        assert np.abs(PhiloxGenerator(1).randn((64,)) - PhiloxGenerator(1 + 2**32).randn((64,))).max() > 1
        np.testing.assert_array_equal(PhiloxGenerator(-1).randn((64,)), PhiloxGenerator(2**64 - 1).randn((64,)))

    def test_more_than_one_launch_fills_is_refused(self) -> None:
        with pytest.raises(RequestError, match=r"noise shape: more values .* at most 536870912 values"):
            PhiloxGenerator(0).randn((2**29 + 1,))

    @pytest.mark.parametrize("gpu", [(0, 2048), (-4, 2048), (8, 255), (-8, -256)])
    def test_a_gpu_without_threads_is_refused(self, gpu: tuple[int, int]) -> None:
        with pytest.raises(ArgumentError, match="holds no block of threads"):
            PhiloxGenerator(0, multiprocessors=gpu[0], threads_per_multiprocessor=gpu[1])

    @pytest.mark.gpu
    @pytest.mark.parametrize("seed", [0, 42, -3, 2**64 - 1, 0x0123_4567_89AB_CDEF])
    def test_torch_on_cuda(self, seed: int) -> None:
        device = torch.cuda.get_device_properties(0)
        gpu = device.multi_processor_count, device.max_threads_per_multi_processor
        ours = PhiloxGenerator(seed, multiprocessors=gpu[0], threads_per_multiprocessor=gpu[1])
        theirs = torch.Generator("cuda").manual_seed(seed)
        grid = gpu[0] * gpu[1]
        for count in (1, 15, 4096, 0, 65536, grid, grid + 1, 2 * grid + 3, 4 * grid, 9 * grid + 17, 7):
            expected = torch.randn(count, generator=theirs, device="cuda").cpu().numpy()
            np.testing.assert_allclose(ours.randn((count,)), expected, rtol=0, atol=CUDA_ATOL)


def published_difference(record: dict[str, Any], seed: int) -> float:
    """The largest difference between a record's values and those a generator of its GPU draws from `seed`."""
    gpu = {key: record[key] for key in ("multiprocessors", "threads_per_multiprocessor") if key in record}
    generator = PhiloxGenerator(seed, **gpu)
    largest = 0.0
    for draw in record["draws"]:
        values = np.array(draw["values"], np.float32)
        drawn = generator.randn(draw["shape"]).ravel()[draw.get("indices", slice(values.size))]
        largest = max(largest, float(np.abs(drawn - values).max()))
    return largest


class TestArguments:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize(
        "seed", [2**64, -(2**63) - 1, pytest.param(10**5000, id="huge"), True, 1.0, "3", None, float("nan")]
    )
    def test_seeds_that_torch_refuses(self, seed: Any, device: Any) -> None:
        with pytest.raises(RequestError, match=r"^seed: .* expected an integer from -2\*\*63 to 2\*\*64 - 1") as caught:
            new_generator(seed, device)
        assert len(str(caught.value)) < 300
        with pytest.raises((ValueError, RuntimeError)):
            torch.Generator().manual_seed(seed)

    @pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
    def test_outermost_seeds(self, seed: int) -> None:
        assert max_difference_from_torch_cpu(seed, [(64,)]) <= TORCH_CPU_ATOL

    def test_numpy_integers_are_seeds(self) -> None:
        np.testing.assert_array_equal(CpuGenerator(np.int64(-3)).randn((20,)), CpuGenerator(-3).randn((20,)))

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("shape", [(-1,), (4, -16, -2), (2.0,), 5, "ab"])
    def test_shapes_that_are_none(self, shape: Any, device: Any) -> None:
        with pytest.raises(RequestError, match=r"^noise shape: "):
            new_generator(0, device).randn(shape)

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("count", [0, 5, 16, 100, 4096, 4097, 4111, 300_001])
    def test_filling_draws_what_is_drawn_anew(self, count: int, device: Any) -> None:
        drawn, filled = new_generator(3, device), new_generator(3, device)
        for _ in range(2):
            out = np.full((2, count), np.nan, np.float32)
            filled.fill(out[1])
            np.testing.assert_array_equal(out[1], drawn.randn((count,)))
            assert np.isnan(out[0]).all()

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_what_is_drawn_does_not_depend_on_the_parts_it_is_drawn_in(
        self, device: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parts = new_generator(3, device).randn((70_003,))
        monkeypatch.setattr(rng, "_CHUNK", 1 << 17)
        np.testing.assert_array_equal(parts, new_generator(3, device).randn((70_003,)))

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_noise_is_not_drawn_into_a_copy(self, device: Any) -> None:
        with pytest.raises(ArgumentError, match="not C-contiguous"):
            new_generator(0, device).fill(np.zeros((8, 8), np.float32)[:, ::2])

    @pytest.mark.parametrize(("device", "kind"), [("cpu", CpuGenerator), ("cuda", PhiloxGenerator)])
    def test_devices(self, device: Any, kind: type) -> None:
        generator = new_generator(11, device)
        assert type(generator) is kind
        noise = generator.randn((4, 8, 8))
        np.testing.assert_array_equal(noise, kind(11).randn((4, 8, 8)))
        assert noise.flags.c_contiguous
        assert noise.flags.writeable

    def test_unknown_device(self) -> None:
        with pytest.raises(
            ArgumentError, match=r"noise generator: unknown device, got 'mps', expected 'cpu' or 'cuda'"
        ):
            new_generator(0, "mps")  # type: ignore[arg-type]
