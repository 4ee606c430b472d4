"""Bodies and byte streams that no client of ours sends: valid ones of `/v1/handoff`, changed by a seeded generator."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np

from tandemrt.runtime import Handover
from tandemrt.runtime.cloud import JSON, MESSAGE, PROTOCOL
from tandemrt.runtime.messages import packed
from tandemrt.serve.protocol import TENSORS, Asked

# What a case is: a body, its headers, as httpx sends them.
Case = tuple[bytes, dict[str, str]]

JOBS: Sequence[Mapping[str, Any]] = (
    {"prompt": "red", "steps": {"unet": 2, "unet_free": 2}, "seed": 7, "until": 2},
    {"prompt": ["red", "blue"], "steps": 3, "seed": [1, 2], "until": 3, "solver": "euler_a", "dtype": "float16"},
    {"prompt": "blue", "negative_prompt": "red", "steps": [["unet_free", 1], ["unet", 2]], "until": 1, "width": 96,
     "guidance_interval": [0.0, 0.5], "guidance_scale": 3.0, "timeout": 1.5},
    {"prompt": "a", "steps": 4, "until": 4, "solver": "heun", "solver_config": {"use_karras_sigmas": True},
     "num_images_per_prompt": 2, "eta": 0.5, "seed_device": "cuda"},
)  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 3, 5, 7, 63, 64, 65, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**400, 0.0, -0.0, 0.5,
            1.0000001, 1e-300, 1e30, 1e308, -1e308, math.nan, math.inf, -math.inf)  # fmt: skip
_TEXTS = ("", " ", "red", "x" * 5000, "\0", "\ud800", "﷽" * 300, "\u202ered", "../../etc/passwd", "unet", "unet_free",
          "cloud:unet", "nan", "ddim", "euler", "euler_a", "lcm", "pndm", "unipc", "deis", "lms", "heun", "flow_euler",
          "dpmsolver++", "karras", "float16", "cuda", "<|endoftext|>" * 50)  # fmt: skip
_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing",
         "steps_offset", "use_karras_sigmas", "solver_order", "algorithm_type", "clip_sample", "thresholding",
         "rescale_betas_zero_snr", "shift", "nothing")  # fmt: skip
_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "BOOL", "U8", "F8_E4M3", "", "f32")


def json_case(random: Random) -> Case:
    """A request in JSON: values of other types and sizes, then perhaps other bytes."""
    facts = _changed(random, dict(random.choice(JOBS)))
    body = _written(random, facts)
    return (_torn(random, body) if random.random() < 0.3 else body), _headers(random, JSON)


def message_case(random: Random, handover: Handover, job: Mapping[str, Any]) -> Case:
    """A message with tensors, whole and sealed, but of other tensors and facts; or one with other bytes."""
    facts = {**job, "start_step": handover.step, "plan": handover.plan, "until": handover.step + 1}
    tensors: dict[str, Any] = {"state": handover.state}
    if random.random() < 0.7:
        tensors = _tensors(random, handover.state)
    if random.random() < 0.5:
        facts = _changed(random, facts)
    protocol = PROTOCOL if random.random() < 0.95 else random.choice(_TEXTS)
    texts = {"protocol": protocol, "request": _text(random, facts)}
    if random.random() < 0.05:
        texts[random.choice(_TEXTS)] = "x"
    try:
        body = packed(tensors, texts)
    except Exception:  # what our own writer refuses is written by hand
        body = packed({"state": handover.state}, {"protocol": PROTOCOL, "request": json.dumps(job)})
    damage = random.random()
    if damage < 0.3:
        body = _with_header(random, body)
    elif damage < 0.5:
        body = _torn(random, body)
    return body, _headers(random, MESSAGE)


def noise_case(random: Random) -> Case:
    """Bytes that are nothing."""
    length = random.choice((0, 1, 7, 8, 9, 100, 5000))
    return random.randbytes(length), _headers(random, random.choice((JSON, MESSAGE)))


def stream_case(random: Random) -> bytes:
    """What a connection carries that is no request, or lies about its body."""
    body = _written(random, random.choice(JOBS))
    size = len(body)
    head = "POST /v1/handoff HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    lies = ("-1", "0", str(size - 3), str(size + 50), "9" * 40, "1e3", "0x10", f"{size}, {size}", "", " ", "\u0661")
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (size, body)
    makers: Sequence[Callable[[], bytes]] = (
        lambda: _head(head + f"Content-Length: {random.choice(lies)}\r\n\r\n") + body,
        lambda: _head(head + f"Content-Length: {size}\r\nContent-Length: {random.choice(lies)}\r\n\r\n") + body,
        lambda: _head(head + "Transfer-Encoding: chunked\r\n\r\n") + _torn(random, chunk),
        lambda: _head(head + f"Transfer-Encoding: chunked\r\nContent-Length: {random.choice(lies)}\r\n\r\n") + chunk,
        lambda: _head(head + "Transfer-Encoding: gzip, chunked\r\n\r\n") + chunk,
        lambda: (
            _head(head + f"Content-Length: {size}\r\nExpect: 100-continue\r\n\r\n") + body[: random.randrange(size)]
        ),
        lambda: _head(head + f"X: {'y' * random.choice((1000, 70_000))}\r\nContent-Length: {size}\r\n\r\n") + body,
        lambda: _head(head + "X: y\r\n" * 3000 + f"Content-Length: {size}\r\n\r\n") + body,
        lambda: 2 * (_head(head + f"Content-Length: {size}\r\n\r\n") + body),
        lambda: _head(head.replace("Host: 127.0.0.1\r\n", "") + f"Content-Length: {size}\r\n\r\n") + body,
        lambda: (
            _head(head.replace("1.1", random.choice(("1.0", "2.0", "9"))) + f"Content-Length: {size}\r\n\r\n") + body
        ),
        lambda: _head(head.replace("POST", random.choice(("GET", "PUT", "HEAD", "OPTIONS", "X" * 300))) + "\r\n"),
        lambda: _head(head.replace("/v1", random.choice(("/%2e%2e/v1", "//v1", "http://x/v1", "/" * 9000))) + "\r\n"),
        lambda: _torn(random, _head(head + f"Content-Length: {size}\r\n\r\n") + body),
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.randbytes(50),
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(200),
        lambda: random.randbytes(random.choice((1, 50, 5000))),
    )
    return random.choice(makers)()


def _head(text: str) -> bytes:
    return text.encode("utf-8")


def _changed(random: Random, facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of which one to three are others, are gone, or are none of the protocol's."""
    for _ in range(random.choice((1, 1, 2, 3))):
        change = random.random()
        if change < 0.1 and facts:
            del facts[random.choice(sorted(facts))]
        elif change < 0.15:
            facts[random.choice((*_TEXTS, "image", "loras", "placement"))] = _value(random)
        else:
            name = random.choice(Asked.__struct_fields__)
            facts[name] = _near(random, facts.get(name)) if random.random() < 0.5 else _value(random)
    return facts


def _value(random: Random, depth: int = 0) -> Any:
    kind = random.random()
    if kind < 0.35:
        return random.choice(_NUMBERS)
    if kind < 0.65 or depth > 2:
        return random.choice(_TEXTS)
    if kind < 0.72:
        return random.choice((None, True, False))
    if kind < 0.86:
        return [_value(random, depth + 1) for _ in range(random.choice((0, 1, 2, 5)))]
    keys = random.choices((*_TEXTS, *_KEYS), k=random.choice((0, 1, 2, 5)))
    return {key: _value(random, depth + 1) for key in keys}


def _near(random: Random, value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None or (isinstance(value, int) and abs(value) > 2**64):
        return _value(random)
    if isinstance(value, (int, float)):
        return random.choice((value + random.choice((-1, 1, 0.5)), -value, value * 1000, random.choice(_NUMBERS)))
    if isinstance(value, str):
        return random.choice((value + random.choice(_TEXTS), value[:1], random.choice(_TEXTS)))
    if isinstance(value, list):
        return random.choice((value * 3, value[:1], [*value, _value(random)], [_near(random, one) for one in value]))
    return {**value, random.choice(_KEYS): _value(random)}


def _text(random: Random, facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, ensure_ascii=random.random() < 0.9)


def _written(random: Random, facts: Mapping[str, Any]) -> bytes:
    text = _text(random, facts)
    if random.random() < 0.05:
        text = f'{text[:-1]}, "prompt": {"[" * 3000}{"]" * 3000}}}'
    if random.random() < 0.05:
        text = f'{text[:-1]}, "seed": {random.choice(("7", "1e5", "-0", "01", "0x1", "7.0", "NaN"))}}}'
    encoding = "utf-8" if random.random() < 0.95 else random.choice(("utf-16", "utf-32", "utf-8-sig"))
    return text.encode(encoding, "surrogatepass")


def _torn(random: Random, body: bytes) -> bytes:
    """Bytes turned, cut, doubled, left out or put in."""
    data = bytearray(body)
    for _ in range(random.choice((1, 1, 2, 8))):
        at, upto = sorted(random.randrange(len(data) + 1) for _ in range(2))
        change = random.randrange(5)
        if change == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif change == 1:
            del data[at:]
        elif change == 2:
            data[at:at] = data[at : min(upto, at + 2000)]
        elif change == 3:
            del data[at:upto]
        else:
            data[at:at] = random.randbytes(random.choice((1, 8, 100)))
    return bytes(data)


def _tensors(random: Random, state: Any) -> dict[str, Any]:
    """Tensors of other shapes, sizes, dtypes and values; perhaps not the one that there should be."""
    change, values = random.randrange(8), state.astype(random.choice((np.float32, np.float16)))
    if change == 0:
        with np.errstate(all="ignore"):
            values = values * np.float32(random.choice((1e4, 1e30, 1e38, np.nan, np.inf, -np.inf, 0.0)))
            values = values.astype(state.dtype if random.random() < 0.5 else np.float16)
    elif change == 1:
        values.flat[random.randrange(values.size)] = random.choice((np.nan, np.inf, -np.inf, 65504.0))
    elif change == 2:
        values = values[tuple(slice(0, random.randrange(size + 1)) for size in values.shape)]
    elif change == 3:
        values = values.reshape(random.choice(((-1,), (1, 1, -1), (*values.shape, 1), values.shape[::-1])))
    elif change == 4:
        values = np.repeat(values, random.choice((2, 3)), axis=random.randrange(values.ndim))
    named = random.choice(("state", "state", "state", *TENSORS, *_TEXTS))
    tensors = {named: np.ascontiguousarray(values)}
    if random.random() < 0.2:
        rank = TENSORS["prompt_embeds"]
        sizes = [random.choice((0, 1, 8, 12, 13)) for _ in range(random.choice((rank, rank, 2, 4)))]
        tensors[random.choice(tuple(TENSORS))] = np.ones(sizes, np.float32)
    return tensors


def _with_header(random: Random, body: bytes) -> bytes:
    """A message whose header says something else of the same bytes."""
    (length,) = struct.unpack("<Q", body[:8])
    header, data = json.loads(body[8 : 8 + length]), body[8 + length :]
    name = random.choice([key for key in header if key != "__metadata__"] or ["state"])
    place = header.setdefault(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    change = random.randrange(8)
    if change == 0:
        place["dtype"] = random.choice(_DTYPES)
    elif change == 1:
        place["shape"] = random.choice(([], [0], [-1], [2**63], [2**32, 2**32], [1.5], "x", None, [10**400]))
    elif change == 2:
        place["data_offsets"] = random.choice(([0, 0], [4, 0], [-4, 4], [0, 2**63], [0], [0, 4, 8], "x", [0.5, 1]))
    elif change == 3:
        header["__metadata__"] = _value(random)
    elif change == 4:
        header["other"] = dict(place)
    elif change == 5:
        header = _value(random)
    elif change == 6:
        header.pop("__metadata__", None)
    else:
        place[random.choice(_TEXTS)] = _value(random)
    text = json.dumps(header).encode() + b" " * random.choice((0, 1, 7, 70_000))
    said = len(text) + random.choice((0, 0, 0, 0, 1, -1, 8, 2**62))
    return struct.pack("<Q", max(0, said)) + text + data


def _headers(random: Random, kind: str) -> dict[str, str]:
    headers = {"content-type": kind}
    if random.random() < 0.05:
        headers["content-type"] = random.choice(("", "text/plain", f"{kind}; charset=utf-16", kind.upper(), "a/b/c"))
    if random.random() < 0.1:
        headers["idempotency-key"] = random.choice(("", "a", "b", "x" * 201, "k" * 200, str(random.random())))
    return headers
