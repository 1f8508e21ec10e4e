"""What a configuration costs: parameters, operations, memory. Nothing is allocated for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.model import PanopticModel, check_size, new_model
from panoptic_cache.train.optim import set_trainable

COCO_IMAGES = 118_287
"""Images of COCO's train2017."""
RATES = {"a100": 312.0, "h100": 989.0, "h200": 989.0, "l4": 121.0, "l40s": 362.0, "rtx4090": 165.0}
"""Published dense bf16 rates of devices, TFLOP/s."""
UTILISATION = 0.3
"""Part of the published rate that training is assumed to reach. It was measured nowhere; `panoptic
bench step` measures it on a device at hand. The paper's own runs come to about 0.05."""


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """The cost of a model, as `model --json` prints it."""

    parameters: dict[str, int]  # Counts of `total`, `encoder`, `decoder`, `heads`
    size: int  # Side of the input, pixels
    patch_size: int  # Pixels
    tokens: int  # Patches of one image
    taps: tuple[int, ...]  # Encoder blocks that the decoder takes, from 1
    blocks: int  # Encoder blocks
    features: int  # Side of the decoder's output before the last resize
    flops_per_image: int  # Floating-point operations of a forward pass with both heads
    # Of a training step, forward and backward, averaged over the tasks as they alternate.
    train_flops_per_image: int
    state_bytes: int  # Weights, gradients and AdamW's two moments, in float32
    activation_bytes_per_image: int  # Kept for the backward pass of an instance step, before losses

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line of a table."""
        parts = self.parameters.items()
        taps = ", ".join(map(str, self.taps))
        return [
            ("parameters", ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in parts)),
            ("input", f"{self.size} px, {self.tokens} patches of {self.patch_size} px"),
            ("taps", f"blocks {taps} of {self.blocks}"),
            ("decoder's output", f"{self.features} x {self.features}, then resized to the input"),
            ("a prediction", f"{self.flops_per_image / 1e9:.1f} GFLOP an image"),
            ("a training step", f"{self.train_flops_per_image / 1e9:.1f} GFLOP an image"),
            ("weights, gradients, AdamW", f"{self.state_bytes / 2**30:.2f} GiB"),
            ("activations", f"{self.activation_bytes_per_image / 2**20:.0f} MiB an image"),
        ]


@dataclass(frozen=True, slots=True)
class RunCost:
    """What a whole run takes on given devices, as `model --device --json` prints it."""

    device: str  # A key of `RATES`
    gpus: int
    images: int  # Of the training cache
    steps: int  # Optimizer steps
    utilisation: float  # Assumed, see `UTILISATION`
    hours: float  # Wall time, if the loader keeps up
    gib_per_gpu: float  # Weights, gradients, AdamW, and activations of a micro-batch

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line of a table."""
        where = f"{self.gpus} x {self.device}, {RATES[self.device]:g} TFLOP/s each"
        return [
            ("the run", f"{self.steps:,} steps over {self.images:,} images"),
            ("time", f"{self.hours:.1f} hours on {where}"),
            ("assumed", f"{self.utilisation:.0%} of that rate is reached; not checked on a GPU"),
            ("memory", f"{self.gib_per_gpu:.1f} GiB a GPU before the losses"),
        ]


def summarize_model(config: TrainConfig, classes: int) -> ModelSummary:
    """Measures a configuration's model on the meta device, for a dataset of `classes`."""
    size, ratio = config.data.size, config.tasks
    with torch.device("meta"):
        model = new_model(config, classes, load_weights=False)
        photo = torch.empty(1, 3, size, size)
    check_size(size, size, model.patch_size)
    every = count(model, trained=True)
    set_trainable(model, config.model)
    frozen = every - count(model, trained=True)
    with torch.no_grad():
        features = model.features(photo).shape[-1]
        with FlopCounterMode(display=False) as forward:
            model(photo, "both")
    bytes_kept, instance = training_cost(model, photo)
    with FlopCounterMode(display=False) as semantic:
        model(photo, "semantic").semantic.sum().backward()
    training = ratio.instance * instance + ratio.semantic * semantic.get_total_flops()
    heads = count(model.instance_head) + count(model.semantic_head)
    parts = {"encoder": count(model.encoder), "decoder": count(model.decoder), "heads": heads}
    total = count(model)
    return ModelSummary(
        parameters={"total": total, **parts},
        size=size,
        patch_size=model.patch_size,
        tokens=(size // model.patch_size) ** 2,
        taps=config.model.taps,
        blocks=model.encoder.config.num_hidden_layers,
        features=features,
        flops_per_image=forward.get_total_flops(),
        train_flops_per_image=round(training / (ratio.instance + ratio.semantic)),
        state_bytes=16 * total - 12 * frozen,
        activation_bytes_per_image=bytes_kept // (1 if config.precision == "fp32" else 2),
    )


def training_cost(model: PanopticModel, photo: Tensor) -> tuple[int, int]:
    """Bytes in float32 that autograd keeps of an instance step, and the step's operations."""
    kept: dict[int, Tensor] = {}  # by storage: views of one tensor count once
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    encoder = model.encoder.config
    rows = (photo.shape[-1] // model.patch_size) ** 2 + 1
    rows += getattr(encoder, "num_register_tokens", 0)

    def keep(tensor: Tensor) -> Tensor:
        # A GPU's attention keeps no matrix of all tokens by all tokens; the meta device's does.
        attention = tensor.shape[-3:] == (encoder.num_attention_heads, rows, rows)
        if tensor.untyped_storage()._cdata not in own and not attention:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as step:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(photo, "instance").instance
        output.sum().backward()
    return sum(t.untyped_storage().nbytes() for t in kept.values()), step.get_total_flops()


def run_cost(
    summary: ModelSummary, config: TrainConfig, device: str, *, gpus: int, images: int
) -> RunCost:
    """The cost of a run; for one without gradient checkpointing, which takes a third longer."""
    steps = config.total_steps(images)
    flops = steps * config.data.batch * summary.train_flops_per_image
    micro_batch = min(config.data.micro_batch, -(-config.data.batch // gpus))
    memory = summary.state_bytes + micro_batch * summary.activation_bytes_per_image
    hours = flops / (gpus * RATES[device] * 1e12 * UTILISATION * 3600)
    return RunCost(device, gpus, images, steps, UTILISATION, hours, memory / 2**30)


def count(module: nn.Module, *, trained: bool = False) -> int:
    """Parameters of a module, or those that train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
