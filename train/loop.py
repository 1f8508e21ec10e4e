"""The training loop: one visible function, top to bottom."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed

from pipeline.errors import InputError
from pipeline.progress import progress
from train.checkpoint import (
    ARCHITECTURE,
    TrainState,
    begin_checkpoint,
    begun_folder,
    finish_checkpoint,
    latest_checkpoint,
    load_training,
    read_state,
    rng_state,
    step_folder,
    write_checkpoint,
)
from train.config import LossConfig, TrainConfig
from train.data import accumulation, iterate, jitter_colour, open_index
from train.encoding import make_encoding
from train.losses import Distance, instance_loss, semantic_loss
from train.model import PanopticModel, Task, check_size
from train.optim import learning_rate, parameter_groups, set_learning_rate
from train.stream import make_loader

log = logging.getLogger(__name__)

MAY_CHANGE = frozenset(
    {
        *("out", "epochs", "steps", "precision", "compile"),
        *("checkpoint_every", "keep", "log_every"),
        *("data.cache", "data.reader", "data.micro_batch", "data.workers"),
        "model.gradient_checkpointing",
        *("optim.lr", "optim.min_lr", "optim.warmup_epochs", "optim.clip_norm"),
    }
)
"""Settings that a run may be resumed with other values of; the rest makes it another run."""


def train(config: TrainConfig, *, resume: bool = False) -> Path:  # noqa: PLR0915 - see above
    """Trains a model from a cache, or goes on where the last complete checkpoint was taken.

    Args:
        config: The whole run.
        resume: Go on; without any checkpoint, start.

    Returns:
        The last checkpoint's folder.

    Raises:
        InputError: Cache, sizes or an earlier run's folder do not fit the configuration.
    """
    # The ranks.
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        # A batch trains one task, so one head is idle.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    main = accelerator.is_main_process

    # The run's folder.
    out = Path(config.out)
    checkpoints, metrics = out / "checkpoints", out / "metrics.jsonl"
    begun = latest_checkpoint(checkpoints) if resume else None
    if not resume and metrics.exists():
        raise InputError(
            "a run lies here already", where=out, remedy="add --resume, or --set out=ANOTHER"
        )

    # The data. The loader is cut into ranks already and must not be prepared.
    index = open_index(config.data)
    samples, categories = index.samples, index.categories
    steps = config.total_steps(samples)
    micro_batches = accumulation(config.data, world)
    if begun is not None:
        check_same_run(read_state(begun), config, index.fingerprint)

    # The model.
    set_seed(config.seed)
    encoding = make_encoding(config.loss.encoding, config.loss.harmonics)
    model = PanopticModel(
        config.model,
        encoding.channels,
        len(categories),
        load_weights=begun is None,
        architecture=begun / ARCHITECTURE if begun else None,
    )
    check_size(config.data.size, config.data.size, model.patch_size)
    model.to(device)  # before its optimizer, whose restored state follows the parameters
    set_seed(config.seed + rank)  # the ranks drop different paths
    blocks = model.encoder.config.num_hidden_layers
    optimizer = torch.optim.AdamW(
        parameter_groups(model, blocks, config.optim), lr=0.0, betas=config.optim.betas
    )
    first = 0
    if begun is not None:
        first = load_training(begun, model, optimizer, rank).step
        log.info("going on from %s", begun)
    network, optimizer = accelerator.prepare(
        torch.compile(model) if config.compile else model,
        optimizer,
        # It would move AdamW's step counts to the GPU, where reading each waits for the device.
        device_placement=[True, False],
    )
    if main:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.toml").write_bytes(tomli_w.dumps(config.to_dict()).encode())
        keep_lines(metrics, first)

    # The steps.
    loader = make_loader(
        config.data,
        index,
        seed=config.seed,
        steps=range(first, steps),
        rank=rank,
        world=world,
        pin=device.type == "cuda",
    )
    batches = iterate(loader)
    warmup = round(config.optim.warmup_epochs * samples / config.data.batch)
    last, note = begun, ""
    with progress("train", steps, "steps", first) as advance:
        for step in range(first, steps):
            started, waited = time.perf_counter(), 0.0
            task = task_of(config.seed, step)
            distance = instance_distance(config.loss, step / steps)
            set_learning_rate(optimizer, rate := learning_rate(config.optim, step, steps, warmup))
            network.train()
            sums = torch.zeros(4, device=device)
            for number in range(micro_batches):
                waiting = time.perf_counter()
                batch = next(batches).to(device)
                waited += time.perf_counter() - waiting
                # Gradients meet between ranks once a step, in its last backward pass.
                final = number == micro_batches - 1
                with nullcontext() if final else accelerator.no_sync(network):
                    prediction = network(jitter_colour(batch.photo, batch.colour), task)
                    losses = (
                        instance_loss(prediction.instance, batch, encoding, config.loss, distance)
                        if task == "instance"
                        else semantic_loss(prediction.semantic, batch, config.loss)
                    )
                    accelerator.backward(losses.total / micro_batches)
                parts = (losses.total, losses.pixel, losses.tv, losses.dice)
                sums += torch.stack([part.detach() for part in parts]) / micro_batches
            accelerator.clip_grad_norm_(network.parameters(), config.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

            # The record. No checkpoint is taken without a look at the loss.
            saved = (step + 1) % config.checkpoint_every == 0 or step + 1 == steps
            if (step + 1) % config.log_every == 0 or saved:
                total, pixel, tv, dice = accelerator.reduce(sums, "mean").tolist()
                if not np.isfinite(total):
                    raise InputError(
                        f"the loss is {total} at step {step}",
                        where=f"batch of {', '.join(batch.keys[:8])}",
                        remedy="lower optim.lr, or use fp32",
                    )
                seconds = time.perf_counter() - started
                line = {
                    "step": step + 1,
                    "epoch": (step + 1) * config.data.batch / samples,
                    "task": task,
                    "loss": total,
                    "pixel": pixel,
                    "tv": tv,
                    "dice": dice,
                    "lr": rate,
                    "images_per_second": config.data.batch / seconds,
                    "waited": waited / seconds,
                }
                if main:
                    with metrics.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                note = f"{task} loss {total:.3f}"
            if main:
                advance(1, note)

            # The checkpoint.
            if saved:
                state = TrainState(step + 1, index.fingerprint, config, categories)
                last = save(
                    accelerator,
                    checkpoints,
                    state,
                    model=model,
                    optimizer=optimizer,
                    keep=config.keep,
                )
    accelerator.end_training()
    if last is None:
        raise InputError("nothing to do: the run has no step", where="epochs")
    return last


def task_of(seed: int, step: int) -> Task:
    """The one task of an optimizer step: instance, instance, semantic, shuffled in each block.

    Exactly twice as many instance as semantic steps, and a pure function of (seed, step): the same
    on every rank, and after resuming.
    """
    block, place = divmod(step, 3)
    semantic = np.random.default_rng([seed, block]).integers(3)
    return "semantic" if place == semantic else "instance"


def instance_distance(config: LossConfig, part: float) -> Distance:
    """The power of the distance in the instance loss, `part` of the way through the run."""
    if config.instance == "squared_then_norm":
        return "squared" if part < config.switch else "norm"
    return config.instance


def check_same_run(state: TrainState, config: TrainConfig, cache_fingerprint: str) -> None:
    """Raises InputError where a checkpoint belongs to another model or another cache."""
    if state.cache_fingerprint != cache_fingerprint:
        raise InputError(
            "the cache is not the one this run began with",
            where=config.data.cache,
            remedy="resume with its cache, or start another run",
        )
    before, now = flat(state.config.to_dict()), flat(config.to_dict())
    changed = [
        f"{name} was {before[name]}, now {now[name]}"
        for name in sorted(before.keys() & now.keys() - MAY_CHANGE)
        if before[name] != now[name]
    ]
    if changed:
        raise InputError(
            f"the checkpoint is of another configuration: {'; '.join(changed)}",
            where=config.out,
            remedy="resume with its config.toml, or start another run",
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as `--set` takes them."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        result |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return result


def keep_lines(metrics: Path, step: int) -> None:
    """Drops the lines after a step: a run that goes on writes them again."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            break  # cut by a kill
    temporary = metrics.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(metrics)


def save(
    accelerator: Accelerator,
    checkpoints: Path,
    state: TrainState,
    *,
    model: PanopticModel,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Writes a checkpoint on all ranks, whole or not at all."""
    if accelerator.is_main_process:
        folder = begin_checkpoint(checkpoints, state.step)
        write_checkpoint(folder, state, model, optimizer)
    accelerator.wait_for_everyone()
    folder = begun_folder(checkpoints, state.step)
    torch.save(rng_state(), folder / f"rng_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_checkpoint(folder, keep)
    accelerator.wait_for_everyone()
    return step_folder(checkpoints, state.step)
