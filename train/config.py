"""`TrainConfig`: every choice of a training run. The defaults are the paper's (section 5.1).

What the paper leaves open is a default here too, with the reason beside it. The files in `configs/`
hold only what differs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from panoptic_cache.pipeline.base.errors import InputError

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What is read and how a batch is made of it."""

    cache: str = ""  # Folder or URL of the training cache
    # `indexed` reads local shards in any order and resumes exactly; `stream` reads shards in
    # sequence from anywhere.
    reader: Literal["indexed", "stream"] = "indexed"
    size: int = 420  # Side of the network's square input, pixels; a multiple of the patch size
    # `squash` to the square, as the paper does; `longest` keeps the aspect ratio and pads; `crop`
    # keeps it, fills the square and crops.
    fit: Literal["squash", "longest", "crop"] = "squash"
    augment: bool = True  # Switches flip, scale and colour off together
    flip: bool = True  # Mirror half of the samples
    # Range of the isotropic scale, drawn log-uniformly; what grows is cropped, what shrinks is
    # padded.
    scale: tuple[float, float] = (0.7, 1.4)
    colour: float = 0.2  # Strength of the jitter of brightness, contrast and saturation
    batch: int = 256  # Samples per optimizer step, over all ranks and accumulated micro-batches
    # The most samples that a rank puts through the network at once. Its part of the batch is cut
    # into as few micro-batches as possible, whose sizes differ by at most one.
    micro_batch: int = 16
    workers: int = 4  # Loader processes per rank
    # Allow a larger `size` than the cache was rendered at. By default that is refused, because
    # photos and targets lack the detail.
    upscale: bool = False


@dataclass(frozen=True, slots=True)
class RandomBackbone:
    """A small `Dinov2Backbone` without pretrained weights, for demos and tests."""

    hidden_size: int = 128  # Width, a multiple of 4 and of `heads`
    layers: int = 6  # Transformer blocks
    heads: int = 4  # Attention heads
    patch_size: int = 7  # Side of a patch, pixels
    # Patches per side that position embeddings are made for; other sizes interpolate them.
    grid: int = 16


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Encoder, decoder and heads (section 3.1)."""

    # Hub name or local folder of a pretrained DINOv2, DINOv2 with registers or DINOv3 ViT, or
    # `random`.
    backbone: str = "facebook/dinov2-base"
    # The architecture that `random` builds.
    random: RandomBackbone = field(default_factory=RandomBackbone)
    # Encoder blocks, counted from 1, whose outputs the decoder takes.
    taps: tuple[int, ...] = (3, 6, 9, 12)
    channels: int = 256  # Width d of the decoder
    # Of the four transposed convolutions. Their product is the upscaling; the rest, up to the
    # image's size, is bilinear. Stride 1 comes second, where it is cheap.
    strides: tuple[int, int, int, int] = (2, 1, 2, 2)
    drop_path: float = 0.0  # Stochastic depth, the same for each block
    # Recompute the encoder in the backward pass to save memory.
    gradient_checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The losses (sections 3.2 and 3.3, appendix A)."""

    # How a centroid is coded; the others are Table 3's.
    encoding: Literal["positional", "direct", "classification"] = "positional"
    harmonics: int = 4  # L of the positional code
    # `norm` is the paper's; `squared` is what an encoder without pretrained weights needs, because
    # the zero code is the geometric median while most pixels are void; `squared_then_norm` changes
    # from one to the other at `switch`.
    instance: Literal["norm", "squared", "squared_then_norm"] = "norm"
    switch: float = 0.5  # Fraction of the run after which `squared_then_norm` takes the norm
    eds: bool = True  # Weight pixels by edge distance sampling; otherwise all pixels weigh the same
    d: float = 20.0  # The distance D, in pixels of the network's input
    w_min: float = 0.0  # Weight of pixels far away from every boundary
    include_void: bool = True  # Unlabelled pixels count in the instance task (Table 2)
    # Of the pixel loss. `mean` divides an image's weighted sum by its sum of weights. `sum` is the
    # paper's plain sum, about 10^4 times as large; total variation and DICE stay means, so `tv` and
    # `dice` need other values then.
    reduction: Literal["mean", "sum"] = "mean"
    tv: float = 0.1  # Weight of the total variation
    dice: float = 1.0  # Weight of DICE, in the instance task

    def distance_at(self, part: float) -> Literal["norm", "squared"]:
        """The power of the distance in the instance loss, at a fraction `part` of the run."""
        if self.instance == "squared_then_norm":
            return "squared" if part < self.switch else "norm"
        return self.instance


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """AdamW with layer decay, linear warm-up and a cosine."""

    lr: float = 5e-4  # Peak learning rate of the decoder and the heads
    min_lr: float = 1e-6  # Where the cosine ends
    warmup_epochs: float = 3.0  # Length of the linear warm-up
    # Factor per block, from the last block down to the embeddings. The paper gives none; 0.6 is its
    # authors' later choice.
    layer_decay: float = 0.6
    weight_decay: float = 0.05  # Not on biases, norms, LayerScale and position embeddings
    betas: tuple[float, float] = (0.9, 0.999)  # Of AdamW
    clip_norm: float = 1.0  # Largest norm of the gradient; inf leaves gradients as they are


@dataclass(frozen=True, slots=True)
class ValidationConfig:
    """Measures held-out samples at intervals: losses, accuracies and, with `metric`, more."""

    cache: str = ""  # Folder of a cache of held-out images, on a local disk
    every: int = 0  # Optimizer steps between two validations; the last step has one too. 0 = never.
    samples: int = 256  # Taken evenly from the cache; the same each time
    # `module:function` of a further measure, or empty; see `validation.Metric`.
    # `panoptic_cache.evaluate.held_out:panoptic_quality` is PQ. It is imported by name, because
    # `train` does not depend on `evaluate`.
    metric: str = ""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A whole run."""

    # Folder of the run: `config.toml`, `metrics.jsonl`, `checkpoints/`, `pictures/`.
    out: str = "runs/train"
    epochs: float = 200.0  # Passes over the cache
    steps: int | None = None  # Optimizer steps, instead of epochs
    seed: int = 0  # Decides weights, order, augmentation and tasks
    precision: Precision = "bf16"  # `bf16` computes in mixed precision
    compile: bool = False  # `torch.compile` the model
    # Optimizer steps between two checkpoints; the last step always has one.
    checkpoint_every: int = 1000
    keep: int = 3  # The newest checkpoints to keep
    # Decay per step of a moving average of the weights, such as 0.9999; none by default.
    ema: float | None = None
    log_every: int = 1  # Optimizer steps between two lines of `metrics.jsonl`
    # Optimizer steps between two pictures of prediction beside truth; 0 = never.
    pictures_every: int = 1000
    # Accelerate's trackers to use beside `metrics.jsonl`, if they are installed.
    trackers: tuple[str, ...] = ("tensorboard",)
    data: DataConfig = field(default_factory=DataConfig)  # See `DataConfig`
    model: ModelConfig = field(default_factory=ModelConfig)  # See `ModelConfig`
    loss: LossConfig = field(default_factory=LossConfig)  # See `LossConfig`
    optim: OptimConfig = field(default_factory=OptimConfig)  # See `OptimConfig`
    validation: ValidationConfig = field(default_factory=ValidationConfig)  # See `ValidationConfig`

    def __post_init__(self) -> None:
        low, high = self.data.scale
        taps = self.model.taps
        sizes = (self.data.batch, self.data.micro_batch)
        intervals = (self.keep, self.checkpoint_every, self.log_every)
        looks = self.validation
        problems = [
            ("data.batch and data.micro_batch must be positive", min(sizes) < 1),
            ("data.scale must be two rising positive numbers", not 0 < low <= high),
            ("model.taps must be rising block numbers from 1", sorted({0, *taps}) != [0, *taps]),
            ("model.strides must be positive", min(self.model.strides) < 1),
            ("loss.d must be positive", self.loss.d <= 0),
            (
                "optim.clip_norm must be positive; inf switches it off",
                not self.optim.clip_norm > 0,
            ),
            ("epochs and steps must be positive", min(self.epochs, self.steps or 1) <= 0),
            ("seed and data.workers must not be negative", min(self.seed, self.data.workers) < 0),
            ("keep, checkpoint_every and log_every must be positive", min(intervals) < 1),
            ("ema must lie between 0 and 1", self.ema is not None and not 0 < self.ema < 1),
            ("pictures_every must not be negative", self.pictures_every < 0),
            ("validation.every must not be negative", looks.every < 0),
            ("validation.samples must be positive", looks.samples < 1),
            ("validation.every needs a validation.cache", looks.every > 0 and not looks.cache),
            (
                "validation.metric must be like panoptic_cache.evaluate.held_out:panoptic_quality",
                looks.metric != "" and not all(looks.metric.partition(":")),
            ),
        ]
        for message, wrong in problems:
            if wrong:
                raise InputError(message, where="configuration")

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of the run over a cache of `samples`."""
        if self.steps is not None:
            return self.steps
        return max(1, int(self.epochs * samples) // self.data.batch)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values for TOML and JSON; fields that are None are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}
