"""The training loop: one visible function, top to bottom."""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import tomli_w
import torch
from accelerate.utils import set_seed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from panoptic_cache.pipeline.base.config import fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import write_file
from panoptic_cache.pipeline.base.process import Interrupted, keep_heap
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.train.augment import jitter_colour
from panoptic_cache.train.caches import class_weights, follow_tiles, open_caches
from panoptic_cache.train.checkpoint import (
    BEST,
    TrainState,
    check_same_run,
    checkpoint_to_resume,
    fixed_settings,
    read_state,
    save_checkpoint,
)
from panoptic_cache.train.config import TaskRatio, TrainConfig
from panoptic_cache.train.data import Share, micro_batch_sizes
from panoptic_cache.train.device import fit_precision, make_accelerator
from panoptic_cache.train.encoding import make_encoding
from panoptic_cache.train.loader import iterate, make_loader
from panoptic_cache.train.losses import instance_loss, semantic_loss
from panoptic_cache.train.model import Task, check_size
from panoptic_cache.train.optim import (
    Ema,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    set_trainable,
)
from panoptic_cache.train.ranks import Ranks, check_launcher
from panoptic_cache.train.restore import build_model, first_model, load_training
from panoptic_cache.train.runlog import RunLog
from panoptic_cache.train.stopping import not_finite, rank_advice, stop_request
from panoptic_cache.train.validation import draw_heads, open_held_out, validate

log = logging.getLogger(__name__)

TASKS: tuple[Task, ...] = ("instance", "semantic")


def train(  # noqa: PLR0912, PLR0915 - one visible function
    config: TrainConfig, *, resume: bool | int = False, trust_config: bool = False
) -> Path:
    """Trains a model from a cache, or continues from the last complete checkpoint.

    Returns the last checkpoint's folder. `resume` goes on from the newest checkpoint, if there is
    one, or from that of a step; `trust_config` imports the `validation.metric` that the
    configuration names, whatever it is. Raises InputError where something does not fit the
    configuration, ranks disagree, or loss or gradient are no longer finite; and Interrupted after
    SIGTERM or SIGINT, when the step is finished and a checkpoint written.
    """
    # The ranks.
    check_launcher(config.precision)
    config = fit_precision(config)
    accelerator = make_accelerator(config)
    ranks = Ranks(accelerator.process_index, accelerator.num_processes)
    main, device, scaler = ranks.main, accelerator.device, accelerator.scaler
    if device.type == "cpu":
        keep_heap(large=True)

    # The run's folder.
    out = Path(config.out)
    checkpoints = out / "checkpoints"
    begun = ranks.first(lambda: checkpoint_to_resume(out, resume)) if resume else None
    if resume and begun is None:
        log.warning("no checkpoint in %s, starting at step 0", out)
    # A start that failed before its first step has left no line.
    lines = out / "metrics.jsonl"
    begins = lines.exists() and lines.stat().st_size > 0
    if not resume and (begins or any(checkpoints.glob("step_*"))):
        raise InputError(
            "a run lies here already", where=out, remedy="add --resume, or --set out=ANOTHER"
        )

    # The data.
    caches = open_caches(config.data)
    config = follow_tiles(config, caches.indexes)
    samples, categories = caches.samples, caches.categories
    steps = config.total_steps(samples)
    sizes = micro_batch_sizes(config.data, ranks.world)
    if config.data.batch > samples:
        log.warning("a batch of %d repeats the cache's %d samples", config.data.batch, samples)
    weights = ranks.first(lambda: class_weights(config, caches))
    held_out = open_held_out(config, categories, trust=trust_config)
    if begun is not None:
        check_same_run(read_state(begun), config, caches.fingerprint)
    state_at = partial(
        TrainState, cache_fingerprint=caches.fingerprint, config=config, categories=categories
    )

    # The model.
    set_seed(config.seed)
    encoding = make_encoding(config.loss.encoding, config.loss.harmonics)
    model = build_model(begun, config, categories) if begun else first_model(config, categories)
    check_size(config.data.size, config.data.size, model.patch_size)
    model.to(device)  # before its optimizer, whose restored state follows the parameters
    set_seed(config.seed + ranks.rank)  # stochastic depth differs between ranks
    blocks = model.encoder.config.num_hidden_layers
    epochs = config.model.freeze_epochs
    thaw = steps if epochs is None else config.steps_of(epochs, samples)
    set_trainable(model, config.model, thawed=thaw < steps)  # the optimizer has all that ever will
    optimizer = torch.optim.AdamW(
        parameter_groups(model, blocks, config.optim), lr=0.0, betas=config.optim.betas
    )
    ema = Ema(model, config.ema) if config.ema is not None else None
    average = ema.model if ema else None
    measured = average or model
    first = 0
    if begun is not None:
        state = load_training(begun, model, optimizer, ranks.rank, ema=average, scaler=scaler)
        first = state.step
        log.info("going on from %s", begun)
        warn_of_jump(read_state(begun).config, config, first, samples)
    ranks.check_same(
        {
            "the cache": caches.fingerprint,
            "the configuration": fingerprint(fixed_settings(config)),
            "the step to begin at": first,
            "the step to end at": steps,
        }
    )
    mine = Share(seed=config.seed, steps=range(first, steps), rank=ranks.rank, world=ranks.world)
    loader = make_loader(config.data, caches, mine, pin=device.type == "cuda")
    set_trainable(model, config.model, thawed=first >= thaw)
    # Not the loader, which is cut into ranks already.
    network, optimizer = accelerator.prepare(
        torch.compile(model) if config.compile else model,
        optimizer,
        # It would move AdamW's step counts to the GPU, where reading each waits for the device.
        device_placement=[True, False],
    )
    if main:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "config.toml", tomli_w.dumps(config.to_dict()).encode())
    ranks.check_shared(out / "config.toml")
    runlog = RunLog(accelerator, out, first, config.to_dict())

    save = partial(
        save_checkpoint,
        ranks,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        ema=average,
        keep=config.keep,
    )

    def look(done: int) -> bool:
        """Measures held-out samples, if that is due; whether PQ has not risen for too long."""
        if held_out is not None and (done % config.validation.every == 0 or done == steps):
            state, power = state_at(done), config.loss.distance_at((done - 1) / steps)
            values = validate(accelerator, measured, held_out, state, power)
            if config.validation.keep_best and ranks.first(
                lambda: values.get("pq", -1.0) > max(runlog.measured("pq"), default=-1.0)
            ):
                save(out / BEST, state, keep=1)
            runlog.validation(done, values)
            return exhausted()
        return False

    def exhausted() -> bool:
        found = ranks.first(lambda: runlog.measured("pq"))
        since = len(found) - 1 - found.index(max(found)) if found else 0
        return 0 < config.validation.patience <= since

    # A run that ended right after a checkpoint has not looked at held-out samples yet.
    if begun is not None and not ranks.first(lambda: runlog.has_validation(first)):
        look(first)
        runlog.curves()

    # The steps.
    of_instances = partial(
        instance_loss, encoding=encoding, config=config.loss, compiled=config.compile
    )
    class_weight = torch.tensor(weights, device=device) if weights else None
    of_categories = partial(
        semantic_loss, config=config.loss, class_weight=class_weight, compiled=config.compile
    )
    warmup = config.steps_of(config.optim.warmup_epochs, samples)
    if warmup >= steps:
        log.warning("a warm-up of %d steps outlasts the run's %d", warmup, steps)
    has_things = any(category.isthing for category in categories)  # else one head has no task
    last, note, asked, skipped = begun, "", 0, 0
    with (
        progress("train", steps, "steps", first) as advance,
        stop_request() as request,
        rank_advice(request),
        closing(iterate(loader, request)) as batches,
    ):
        for step in range(first, first if exhausted() else steps):
            started, waited = time.perf_counter(), 0.0
            task = task_of(config.seed, step, config.tasks) if has_things else "semantic"
            distance = config.loss.distance_at(step / steps)
            if first < step == thaw:
                set_trainable(model, config.model, thawed=True)
                if isinstance(network, DistributedDataParallel):  # knows what trained when it began
                    accelerator.free_memory()
                    network = DistributedDataParallel(
                        network.module, network.device_ids, find_unused_parameters=True
                    )
            set_learning_rate(optimizer, rate := learning_rate(config.optim, step, steps, warmup))
            network.train()
            # Total, pixel, TV and DICE loss of each micro-batch: (micro-batches, 4)
            terms, keys = torch.zeros(len(sizes), 4, device=device), list[tuple[str, ...]]()
            for number, size in enumerate(sizes):
                waiting = time.perf_counter()
                batch = next(batches).to(device)  # photo (b, 3, S, S), segment_map (b, S, S), uint8
                waited += time.perf_counter() - waiting
                keys.append(batch.keys)
                # Ranks exchange gradients once a step, in its last backward pass.
                final, share = number == len(sizes) - 1, size / sum(sizes)
                with nullcontext() if final else accelerator.no_sync(network):
                    # One head is run: instance (b, channels, S', S') or semantic (b, C, S', S').
                    # S' is the decoder's output side.
                    found = network(jitter_colour(batch.photo, batch.colour, batch.void), task)
                    losses = (
                        of_instances(found.instance, batch, distance=distance)
                        if task == "instance"
                        else of_categories(found.semantic, batch)
                    )
                    accelerator.backward(losses.total * share)
                parts = (losses.total, losses.pixel, losses.tv, losses.dice)
                terms[number] = torch.stack([part.detach() for part in parts]) * share

            # Before the weights change: what is not finite reaches no checkpoint.
            if scaler is not None:
                scaler.unscale_(optimizer.optimizer)  # also one that `free_memory` has forgotten
            norm = clip_grad_norm_(network.parameters(), config.optim.clip_norm)
            *totals, length = torch.cat([terms[:, 0], norm.view(1)]).tolist()
            # What overflows in fp16 is no fault of the run until the scale can fall no more: the
            # scaler leaves the step out and halves the scale.
            overflow = scaler is not None and not math.isfinite(length) and scaler.get_scale() > 1
            finite = all(map(math.isfinite, totals if overflow else (*totals, length)))
            verdict = ranks.agree(step, TASKS.index(task), signal=request.signal, finite=finite)
            if not verdict.finite:
                raise not_finite(ranks, step, totals, keys, length)
            optimizer.step()
            optimizer.zero_grad()
            skipped += overflow
            if ema is not None:
                ema.update(model, step)

            # The record.
            done = step + 1
            if done % config.log_every == 0 or done == steps:
                terms_of_step = accelerator.reduce(terms.sum(0), "mean").tolist()
                seconds = time.perf_counter() - started
                line = {
                    "step": done,
                    "epoch": done * config.data.batch / samples,
                    "task": task,
                    **dict(zip(("loss", "pixel", "tv", "dice"), terms_of_step, strict=True)),
                    "norm": length,
                    "lr": rate,
                    "images_per_second": config.data.batch / seconds,
                    "waited": waited / seconds,
                }
                if scaler is not None:
                    line |= {"scale": scaler.get_scale(), "skipped": skipped}
                    skipped = 0
                runlog.step({k: v for k, v in line.items() if k != "norm" or math.isfinite(length)})
                note = f"{task} loss {line['loss']:.3f}"
            if main:
                advance(1, note)

            # The checkpoint.
            asked = verdict.signal if done < steps else 0
            due = done % config.checkpoint_every == 0 or done == steps
            if due or asked:
                last = save(checkpoints, state_at(done))
            if asked:
                break

            # Held-out samples and pictures.
            ends = look(done) and done < steps
            if main and config.pictures_every and done % config.pictures_every == 0:
                shown = next(held_out.batches(config, 0, 1)).to(device) if held_out else batch
                with accelerator.autocast():
                    runlog.picture(done, draw_heads(measured, shown, encoding, categories))
            if due or ends:
                runlog.curves()
            if ends:
                log.info("PQ has not risen for long enough: step %d is the last", done)
                last = last if due else save(checkpoints, state_at(done))
                break
    accelerator.end_training()
    if asked:
        raise Interrupted(asked, f"{last} is complete, --resume goes on from it")
    if last is None:
        raise InputError("nothing to do: the run has no step", where="epochs")
    return last


def warn_of_jump(before: TrainConfig, now: TrainConfig, step: int, samples: int) -> None:
    """Says if the learning rate rises where a run goes on, as its cosine ends later than before."""
    ends = [config.total_steps(samples) for config in (before, now)]
    rates = [
        learning_rate(optim, min(at, end - 1), end, config.steps_of(optim.warmup_epochs, samples))
        for config, end, at in zip((before, now), ends, (step - 1, step), strict=True)
        for optim in [config.optim]
    ]
    if rates[1] > 2 * rates[0]:  # a warm-up at most doubles it
        log.warning(
            "the learning rate jumps from %.2g to %.2g: the run was to end at step %d, now at %d",
            *(*rates, *ends),
        )


def task_of(seed: int, step: int, tasks: TaskRatio) -> Task:
    """The task of an optimizer step. Which steps of a block are semantic is random.

    But it is a pure function of (seed, step): the same on every rank and after resuming.
    """
    block, place = divmod(step, tasks.instance + tasks.semantic)
    draw = np.random.default_rng([seed, block])
    semantic = draw.choice(tasks.instance + tasks.semantic, tasks.semantic, replace=False)
    return "semantic" if place in semantic else "instance"
