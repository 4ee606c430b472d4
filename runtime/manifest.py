"""What the bundle manifest, `tandem.json`, says.

`tandem.schema.json` beside this file is its JSON Schema, as `python -m tandemrt.runtime.manifest` prints it.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

from .calibrations import Calibrations, CallTime

FORMAT = 1

Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32"]
Role = Literal["text_encoder", "denoiser", "controlnet", "vae_decoder", "vae_encoder"]
Precision = Literal["fp32", "fp16"]
QuantizationFormat = Literal["int8", "fp8", "int8-weights", "int4-weights"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


class Frozen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest entry: immutable, without unknown fields.

    Each entry repeats kw_only, which msgspec does not inherit, and frozen, which mypy does not.
    """


class FileRecord(Frozen, frozen=True, kw_only=True):
    """What a file of the bundle must be: `size` in bytes and its `sha256` as 64 hexadecimal digits."""

    size: int
    sha256: str


class TensorSpec(Frozen, frozen=True, kw_only=True):
    """A graph input or output; a string in `shape` is a symbolic dimension such as `batch`."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]


class Evidence(Frozen, frozen=True, kw_only=True):
    """One comparison of the exported graph with PyTorch that the export passed.

    `metric` is `max_relative_error`: the largest absolute difference divided by the largest absolute reference value.
    `input_shapes` are the shapes the figure was measured at.
    """

    metric: str
    value: float
    threshold: float
    input_shapes: dict[str, tuple[int, ...]]

    @property
    def holds(self) -> bool:
        """Whether the value is within the threshold; NaN is not."""
        return self.value <= self.threshold


class Source(Frozen, frozen=True, kw_only=True):
    """Where a component came from: the class its `config.json` names, a digest over configuration and weights."""

    class_name: str
    sha256: str


class SchedulerDefaults(Frozen, frozen=True, kw_only=True):
    """A diffusers scheduler configuration: the class name and its keys."""

    class_name: str
    config: dict[str, Any]


class Loss(Frozen, frozen=True, kw_only=True):
    """What quantization took, by pictures of prompts that were painted from the same noise as the float bundle's.

    `psnr_db` is the PSNR of the mean squared error of all pictures to the float bundle's, `worst_psnr_db` that of the
    worst picture, `ssim` their mean structural similarity, `latent_error` the RMS of the latents' difference over that
    of the float bundle's. `accuracy` is the share of the pictures that a scorer accepts, `float_accuracy` that of the
    float bundle's, None where there was no scorer.
    `min_psnr_db` and `min_accuracy`, a share of `float_accuracy`, are the budget that had to hold; None where none was
    asked for. `judged` is how many candidates were judged by these prompts until one held, this one included.
    `bundle` is the float bundle's digest; there were so many `prompts`, `prompts_sha256` is that of their lines, the
    first was painted from `seed`, each next one from the next; `held_out` is off where none were given, and the empty
    prompt alone was painted; `painted` says how: denoisers and their steps, decoder, size, target.
    """

    psnr_db: float
    worst_psnr_db: float
    ssim: float
    latent_error: float
    accuracy: float | None = None
    float_accuracy: float | None = None
    min_psnr_db: float | None = None
    min_accuracy: float | None = None
    judged: int = 1
    bundle: str
    prompts: int
    prompts_sha256: str
    seed: int
    held_out: bool = True
    painted: str

    @property
    def holds(self) -> bool:
        """Whether all is within the budget; NaN is not."""
        if self.min_psnr_db is not None and not self.psnr_db >= self.min_psnr_db:
            return False
        if self.min_accuracy is None:
            return True
        if self.accuracy is None or self.float_accuracy is None:
            return False
        return self.accuracy >= self.min_accuracy * self.float_accuracy


class Quantization(Frozen, frozen=True, kw_only=True):
    """What a component's graph does in eight or four bits.

    `format`: `int8` and `fp8` compute so, with activations and weights between QuantizeLinear and DequantizeLinear;
    `int8-weights` and `int4-weights` keep weights so and compute in the component's precision.
    `tool` with its `version` quantized, by `settings`. `layers` is how many layers are quantized; `kept` names those
    that could have been and are not. `float_model` is the sha256 of the graph that was quantized, `trajectories` the
    digest of what it was given while ranges were found, None where none are needed. `speed` is of where it was judged.
    """

    format: QuantizationFormat
    tool: str
    version: str
    settings: dict[str, Any]
    layers: int
    kept: tuple[str, ...] = ()
    float_model: str
    trajectories: str | None = None
    losses: tuple[Loss, ...] = ()
    speed: CallTime | None = None

    @property
    def computes(self) -> bool:
        """Whether its layers compute in the format, not only keep weights in it."""
        return self.format in ("int8", "fp8")


class Component(Frozen, frozen=True, kw_only=True):
    """One model of the bundle.

    `model` is the ONNX file's path; its external data, if any, stands in the manifest's `files` beside it.
    `precision` is that of what computes in floating point. `evidence` is of the graph as it was exported, and empty
    where `quantization` tells of another one in its place.
    `prediction_type`, `spatial_multiple` (latent height and width must be multiples of it) and `scheduler` (where the
    denoiser brings its own, as one-step models do) are of denoisers only.
    """

    role: Role
    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Precision
    fp32_islands: tuple[str, ...] = ()
    source: Source
    parameters: int
    prediction_type: PredictionType | None = None
    spatial_multiple: int = 1
    scheduler: SchedulerDefaults | None = None
    evidence: tuple[Evidence, ...]
    quantization: Quantization | None = None

    @property
    def computes_in(self) -> str:
        """The precision that its graph says: `int8` or `fp8` where layers compute so, else its own."""
        quantization = self.quantization
        return quantization.format if quantization is not None and quantization.computes else self.precision


class LatentSpace(Frozen, frozen=True, kw_only=True):
    """The space denoisers and decoders share; a decoder is given `latent / scaling_factor + shift_factor`."""

    channels: int
    downsampling: int
    scaling_factor: float
    shift_factor: float = 0.0


class TextEncoding(Frozen, frozen=True, kw_only=True):
    """What one text encoder adds to the conditioning.

    `tokenizer` is the folder of its tokenizer, which pads prompts to `max_length` tokens.
    `hidden_state` and `pooled` name the component's outputs that are used: (B, max_length, width), and where pooled
    text is used (B, pooled_width).
    `joins`: its hidden states stand beside those of the encoders before it (`width`) or behind them (`sequence`).
    """

    tokenizer: str = "tokenizer"
    max_length: int
    width: int
    hidden_state: str = "last_hidden_state"
    pooled: str | None = None
    pooled_width: int = 0
    joins: Literal["width", "sequence"] = "width"


class TextConditioning(Frozen, frozen=True, kw_only=True):
    """How prompts become `encoder_hidden_states` (B, max_length, width) and, joined in order, the pooled vector.

    `encoders` is by component, in the order they join. Hidden states narrower than `width` are padded with zeros.
    `zero_tokens` rows of zeros follow, in the place of an encoder that was left out.
    `zero_negative`: an absent negative prompt means zeros throughout, not the empty prompt.
    """

    encoders: dict[str, TextEncoding]
    width: int
    zero_tokens: int = 0
    zero_negative: bool = False

    @property
    def max_length(self) -> int:
        """How many tokens `encoder_hidden_states` has."""
        beside = [encoder.max_length for encoder in self.encoders.values() if encoder.joins == "width"]
        behind = [encoder.max_length for encoder in self.encoders.values() if encoder.joins == "sequence"]
        return max(beside, default=0) + sum(behind) + self.zero_tokens

    @property
    def pooled_width(self) -> int:
        """How wide the joined pooled vectors are; 0 where none is used."""
        return sum(encoder.pooled_width for encoder in self.encoders.values())


class AdaptiveNumbers(Frozen, frozen=True, kw_only=True):
    """Those of `runtime.adaptive.AdaptiveRule`."""

    threshold: float
    release: float
    probe: int
    steady: float


class WindowNumbers(Frozen, frozen=True, kw_only=True):
    """Those of `runtime.discrepancy.Taus`."""

    l_slope: int
    eps_slope: float
    k: int
    tau_cap: int


class Defaults(Frozen, frozen=True, kw_only=True):
    """What a generation uses where the caller says nothing; `height` and `width` in pixels.

    `timesteps` and `eta` are those of a model that was distilled for them, and hold for the bundle's own scheduler.
    `guidance_interval` is of fixed guidance; `adaptive` and `taus` are what adaptive guidance and the placement
    `hybridiff` use where they are asked for. All three are what `tandemrt calibrate guidance` measured.
    `steps` are runs of inference steps on one denoiser, `num_inference_steps` in all; without them the first runs all.
    """

    height: int
    width: int
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    timesteps: tuple[int, ...] | None = None
    steps: tuple[tuple[str, int], ...] | None = None
    eta: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    adaptive: AdaptiveNumbers | None = None
    taus: WindowNumbers | None = None


class Manifest(Frozen, frozen=True, kw_only=True):
    """Everything a runtime needs to know of a bundle; `files` lists every file but the manifest and its seal."""

    format: int
    producers: dict[str, str]
    components: dict[str, Component]
    files: dict[str, FileRecord]
    latent: LatentSpace
    text: TextConditioning
    scheduler: SchedulerDefaults
    defaults: Defaults
    calibrations: Calibrations = Calibrations()

    @property
    def files_digest(self) -> str:
        """The sha256 of all files that are listed: of models, tokenizers and the rest, whatever the defaults are."""
        return hashlib.sha256(msgspec.json.encode(self.files, order="deterministic")).hexdigest()

    def model_digest(self, component: str) -> str:
        """The sha256 of all files in a component's folder: of its model and weights, whatever it is called."""
        folder, slash, model = self.components[component].model.rpartition("/")
        own = {path: record.sha256 for path, record in self.files.items() if path.startswith(folder + slash)}
        listed = [model, sorted((path.removeprefix(folder + slash), sha256) for path, sha256 in own.items())]
        return hashlib.sha256(msgspec.json.encode(listed)).hexdigest()

    def names(self, role: Role) -> tuple[str, ...]:
        """The components that play `role`, in the manifest's order."""
        return tuple(name for name, component in self.components.items() if component.role == role)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `tandem.json`."""
    return msgspec.json.schema(Manifest)


if __name__ == "__main__":
    print(msgspec.json.format(msgspec.json.encode(json_schema()), indent=2).decode())
