"""The device and the precision of a training, through Accelerate."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    parse_flag_from_env,
)

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.model import HALF
from panoptic_cache.train.runlog import installed_trackers

log = logging.getLogger(__name__)


def device_kind() -> Literal["cuda", "mps", "cpu"]:
    """What a training takes: the best that there is, but MPS, which has no ranks, only alone."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):  # accelerate launch --cpu
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return "mps" if alone and torch.backends.mps.is_available() else "cpu"


def fit_precision(config: TrainConfig) -> TrainConfig:
    """The configuration in a precision that the device has; InputError for fp16 without CUDA."""
    kind = device_kind()
    if config.precision == "fp16" and kind != "cuda":
        raise InputError(
            f"fp16 needs a CUDA device, this is {kind}",
            where="precision",
            remedy="--set precision=fp32",
        )
    if config.precision == "bf16" and kind == "mps":  # macOS before 14 has no bf16 there
        log.warning("on MPS a run computes in fp32")
        return replace(config, precision="fp32")
    return config


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Joins the ranks of the launcher; with fp16, the accelerator has a gradient scaler."""
    accelerator = Accelerator(
        mixed_precision=config.precision if config.precision in HALF else "no",
        cpu=device_kind() == "cpu",
        # A batch trains one task, so one head is idle.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        # Else a variable of the environment divides the gradients.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=installed_trackers(config.trackers) or None,
        project_dir=config.out,
    )
    device = accelerator.device
    if config.precision == "bf16" and device.type == "cuda":
        ampere = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        if not ampere:
            log.warning("this GPU only emulates bf16, which is slow: --set precision=fp16")
    return accelerator
