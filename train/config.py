"""`TrainConfig`: every choice of a training run. The defaults are the paper's (section 5.1).

What the paper leaves open is a default here too, with the reason beside it. The files in `configs/`
hold only what differs. A number's range is part of its type; reading a configuration checks it.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from panoptic_cache.pipeline.base.errors import InputError

Precision = Literal["bf16", "fp16", "fp32"]

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Interval = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # in optimizer steps; 0 = never
Side = Annotated[int, Meta(ge=1, le=8192)]  # pixels, patches or channels
Layers = Annotated[int, Meta(ge=1, le=256)]
Stride = Annotated[int, Meta(ge=1, le=16)]
Workers = Annotated[int, Meta(ge=0, le=1024)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 2**16)]  # NumPy's, with room for the ranks
Scale = Annotated[float, Meta(ge=0.05, le=10)]
Positive = Annotated[float, Meta(gt=0, le=1e6)]
Weight = Annotated[float, Meta(ge=0, le=1e6)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]
Factor = Annotated[float, Meta(gt=0, le=1)]
PeakRate = Annotated[float, Meta(gt=0, le=100)]
Rate = Annotated[float, Meta(ge=0, le=100)]


def expand(config: object, *names: str) -> None:
    """Puts a home and environment variables into paths of a configuration that is being made."""
    for name in names:
        path = os.path.expandvars(getattr(config, name))
        path = os.path.expanduser(path)  # noqa: PTH111 - a Path would mend URLs
        if missing := re.search(r"\$(\w+|\{\w+\})", path):
            raise InputError(f"{missing[0]} is not set", where=f"{name} = {path}")
        if "\0" in path:
            raise InputError("a path holds no zero byte", where=f"{name} = {path!r}")
        object.__setattr__(config, name, path)


@dataclass(frozen=True, slots=True)
class CachePart:
    """One of several training caches."""

    path: Annotated[str, Meta(min_length=1)]  # Folder or URL
    # Its share of an epoch is this to the sum of all ratios; by default its number of samples.
    ratio: Positive | None = None

    def __post_init__(self) -> None:
        expand(self, "path")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What is read and how a batch is made of it."""

    cache: str = ""  # Folder or URL of the training cache
    # Instead of it several, as {path = "...", ratio = 1.0}. An epoch has as many samples as they
    # hold together. Each cache goes through its own samples, all of them before any comes again.
    caches: tuple[CachePart, ...] = ()
    # `indexed` reads local shards in any order and resumes exactly; `stream` reads shards in
    # sequence from anywhere.
    reader: Literal["indexed", "stream"] = "indexed"
    size: Side = 420  # Side of the network's square input, pixels; a multiple of the patch size
    # `squash` to the square, as the paper does; `longest` keeps the aspect ratio and pads; `crop`
    # keeps it, fills the square and crops.
    fit: Literal["squash", "longest", "crop"] = "squash"
    # Instead of a fit: the side, in pixels of the cache, of what fills the input. 0 = that of the
    # cache's tiles, where it holds tiles. Larger samples are cropped at random places.
    tile: Annotated[int, Meta(ge=0, le=8192)] = 0
    augment: bool = True  # Switches flip, scale and colour off together
    flip: bool = True  # Mirror half of the samples
    # Range of the isotropic scale, drawn log-uniformly; what grows is cropped, what shrinks is
    # padded.
    scale: tuple[Scale, Scale] = (0.7, 1.4)
    colour: Fraction = 0.2  # Strength of the jitter of brightness, contrast and saturation
    batch: Count = 256  # Samples per optimizer step, over all ranks and accumulated micro-batches
    # The most samples that a rank puts through the network at once. Its part of the batch is cut
    # into as few micro-batches as possible, whose sizes differ by at most one.
    micro_batch: Count = 16
    workers: Workers = 4  # Loader processes per rank
    # Allow a larger `size` than the cache was rendered at. By default that is refused, because
    # photos and targets lack the detail.
    upscale: bool = False

    def __post_init__(self) -> None:
        expand(self, "cache")

    @property
    def paths(self) -> tuple[str, ...]:
        """Folders or URLs of all training caches."""
        return tuple(part.path for part in self.caches) or (self.cache,)


@dataclass(frozen=True, slots=True)
class RandomBackbone:
    """A small `Dinov2Backbone` without pretrained weights, for demos and tests."""

    hidden_size: Side = 128  # Width, a multiple of 4 and of `heads`
    layers: Layers = 6  # Transformer blocks
    heads: Layers = 4  # Attention heads
    patch_size: Side = 7  # Side of a patch, pixels
    # Patches per side that position embeddings are made for; other sizes interpolate them.
    grid: Side = 16


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Encoder, decoder and heads (section 3.1)."""

    # Hub name or local folder of a pretrained DINOv2, DINOv2 with registers or DINOv3 ViT, a `.pth`
    # file of DINOv2's authors, or `random`.
    backbone: str = "facebook/dinov2-base"
    # A run, checkpoint or export to start from: encoder, decoder and heads, whose categories are
    # matched by name. A resumed run does not read it.
    init: str = ""
    init_heads: bool = True  # Take its heads too; else both start anew
    # The architecture that `random` builds.
    random: RandomBackbone = field(default_factory=RandomBackbone)
    # Encoder blocks, counted from 1, whose outputs the decoder takes.
    taps: Annotated[tuple[Layers, ...], Meta(min_length=1)] = (3, 6, 9, 12)
    channels: Side = 256  # Width d of the decoder
    # What pixels are scaled by: `imagenet`'s mean and deviation, as pretrained weights expect, or
    # those of each `input` itself, for pictures whose brightness and contrast mean nothing, as in
    # microscopy.
    normalise: Literal["imagenet", "input"] = "imagenet"
    # Of the four transposed convolutions. Their product is the upscaling; the rest, up to the
    # image's size, is bilinear. Stride 1 comes second, where it is cheap.
    strides: tuple[Stride, Stride, Stride, Stride] = (2, 1, 2, 2)
    drop_path: Decay = 0.0  # Stochastic depth, the same for each block
    # A part that keeps its weights, with neither gradients nor a state of the optimizer.
    freeze: Literal["none", "encoder", "decoder"] = "none"
    freeze_epochs: Weight | None = None  # How long; the whole run by default
    # Of the encoder train only so many of the last blocks, and its final norm; all by default.
    trainable_blocks: Layers | None = None
    # Recompute the encoder in the backward pass to save memory.
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        expand(self, "backbone", "init")


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The losses (sections 3.2 and 3.3, appendix A)."""

    # How a centroid is coded; the others are Table 3's.
    encoding: Literal["positional", "direct", "classification"] = "positional"
    harmonics: Annotated[int, Meta(ge=1, le=16)] = 4  # L of the positional code
    # `norm` is the paper's; `squared` is what an encoder without pretrained weights needs, because
    # the zero code is the geometric median while most pixels are void; `squared_then_norm` changes
    # from one to the other at `switch`.
    instance: Literal["norm", "squared", "squared_then_norm"] = "norm"
    switch: Fraction = 0.5  # Fraction of the run after which `squared_then_norm` takes the norm
    eds: bool = True  # Weight pixels by edge distance sampling; otherwise all pixels weigh the same
    d: Positive = 20.0  # The distance D, in pixels of the network's input
    w_min: Fraction = 0.0  # Weight of pixels far away from every boundary
    include_void: bool = True  # Unlabelled pixels count in the instance task (Table 2)
    # Of the pixel loss. `mean` divides an image's weighted sum by its sum of weights. `sum` is the
    # paper's plain sum, about 10^4 times as large; total variation and DICE stay means, so `tv` and
    # `dice` need other values then.
    reduction: Literal["mean", "sum"] = "mean"
    # Factors of the semantic cross-entropy by category: a table of names, where the others have 1,
    # or `inverse_sqrt`: one over the square root of a category's part of the pixels, scaled so that
    # the mean over pixels is 1. They are no part of the weights that `mean` divides by.
    class_weights: Literal["none", "inverse_sqrt"] | dict[str, Weight] = "none"
    tv: Weight = 0.1  # Weight of the total variation
    dice: Weight = 1.0  # Weight of DICE, in the instance task

    def distance_at(self, part: float) -> Literal["norm", "squared"]:
        """The power of the distance in the instance loss, at a fraction `part` of the run."""
        if self.instance == "squared_then_norm":
            return "squared" if part < self.switch else "norm"
        return self.instance


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """AdamW with layer decay, linear warm-up and a cosine."""

    lr: PeakRate = 5e-4  # Peak learning rate of the decoder and the heads
    # Peak learning rate of the encoder's last block; by default `lr` times `layer_decay`.
    encoder_lr: PeakRate | None = None
    min_lr: Rate = 1e-6  # Where the cosine ends
    warmup_epochs: Weight = 3.0  # Length of the linear warm-up
    # Factor per block, from the last block down to the embeddings. The paper gives none; 0.6 is its
    # authors' later choice.
    layer_decay: Factor = 0.6
    weight_decay: Rate = 0.05  # Not on biases, norms, LayerScale and position embeddings
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # Of AdamW
    # Largest norm of the gradient; inf leaves gradients as they are
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0


@dataclass(frozen=True, slots=True)
class ValidationConfig:
    """Measures held-out samples at intervals: losses, accuracies and, with `metric`, more."""

    cache: str = ""  # Folder of a cache of held-out images, on a local disk
    # Optimizer steps between two validations; the last step has one too. 0 = never.
    every: Interval = 0
    samples: Count = 256  # Taken evenly from the cache; the same each time
    # `module:function` of a further measure, or empty; see `validation.Metric`.
    # `panoptic_cache.evaluate.held_out:panoptic_quality` is PQ. It is imported by name, because
    # `train` does not depend on `evaluate`.
    metric: str = ""
    keep_best: bool = False  # Keep the checkpoint of the highest `pq` of the metric in OUT/best
    patience: Interval = 0  # End after so many validations in turn without a higher `pq`; 0 = never

    def __post_init__(self) -> None:
        expand(self, "cache")


@dataclass(frozen=True, slots=True)
class TaskRatio:
    """How many of some steps in turn train each head; 0 leaves a head alone (section 5.1)."""

    instance: Annotated[int, Meta(ge=0, le=1000)] = 2
    semantic: Annotated[int, Meta(ge=0, le=1000)] = 1


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A whole run."""

    # Folder of the run: `config.toml`, `metrics.jsonl`, `checkpoints/`, `pictures/`.
    out: Annotated[str, Meta(min_length=1)] = "runs/train"
    epochs: Positive = 200.0  # Passes over the cache
    steps: Count | None = None  # Optimizer steps, instead of epochs
    seed: Seed = 0  # Decides weights, order, augmentation and tasks
    # `bf16` computes in mixed precision. So does `fp16`, for GPUs before Ampere, with a scale of
    # the loss; a step whose gradient overflows is left out, and the scale halved.
    precision: Precision = "bf16"
    compile: bool = False  # `torch.compile` the model
    # Optimizer steps between two checkpoints; the last step always has one.
    checkpoint_every: Count = 1000
    keep: Count = 3  # The newest checkpoints to keep
    # Decay per step of a moving average of the weights, such as 0.9999; none by default.
    ema: Annotated[float, Meta(gt=0, lt=1)] | None = None
    log_every: Count = 1  # Optimizer steps between two lines of `metrics.jsonl`
    # Optimizer steps between two pictures of prediction beside truth; 0 = never.
    pictures_every: Interval = 1000
    # Accelerate's trackers to use beside `metrics.jsonl`, if they are installed.
    trackers: tuple[str, ...] = ("tensorboard",)
    tasks: TaskRatio = field(default_factory=TaskRatio)  # See `TaskRatio`
    data: DataConfig = field(default_factory=DataConfig)  # See `DataConfig`
    model: ModelConfig = field(default_factory=ModelConfig)  # See `ModelConfig`
    loss: LossConfig = field(default_factory=LossConfig)  # See `LossConfig`
    optim: OptimConfig = field(default_factory=OptimConfig)  # See `OptimConfig`
    validation: ValidationConfig = field(default_factory=ValidationConfig)  # See `ValidationConfig`

    def __post_init__(self) -> None:
        expand(self, "out")
        low, high = self.data.scale
        ratios = [part.ratio for part in self.data.caches]
        taps, looks = self.model.taps, self.validation
        problems = [
            ("data.scale must be two rising numbers", low > high),
            ("name data.cache or data.caches, not both", ratios != [] and self.data.cache != ""),
            ("all data.caches or none need a ratio", None in ratios and any(ratios)),
            ("tasks must train a head", self.tasks.instance + self.tasks.semantic == 0),
            ("model.taps must be rising block numbers from 1", sorted({0, *taps}) != [0, *taps]),
            ("validation.every needs a validation.cache", looks.every > 0 and not looks.cache),
            (
                "validation.keep_best and validation.patience need a validation.metric",
                (looks.keep_best or looks.patience > 0) and not (looks.every and looks.metric),
            ),
            (
                "validation.metric must be like panoptic_cache.evaluate.held_out:panoptic_quality",
                looks.metric != "" and not all(looks.metric.partition(":")),
            ),
        ]
        for message, wrong in problems:
            if wrong:
                raise InputError(message, where="configuration")

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of the run with epochs of `samples`."""
        if self.steps is not None:
            return self.steps
        return max(1, int(self.epochs * samples) // self.data.batch)

    def steps_of(self, epochs: float, samples: int) -> int:
        """The nearest whole number of optimizer steps."""
        return round(epochs * samples / self.data.batch)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values for TOML and JSON; fields that are None are left out."""
        return asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None})
