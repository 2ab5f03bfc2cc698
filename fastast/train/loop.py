"""The training loop."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace

import torch
from torch import nn

from fastast.data import AudioDataset
from fastast.ops import hop_from_ms
from fastast.random import random_bits
from fastast.train.evaluate import evaluate
from fastast.train.progress import Progress
from fastast.train.recipe import (
    Recipe,
    TrainConfig,
    build_filterbank,
    build_method,
    finest_shift,
    load_data,
    make_loader,
)
from fastast.train.run import RunDirectory
from fastast.train.schedule import make_optimizer, warmup_cosine


def pick_device(name: str) -> torch.device:
    """``"auto"`` is a GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def measure_statistics(recipe: Recipe, dataset: AudioDataset, clips: int = 500) -> Recipe:
    """Fills in ``frontend.mean`` and ``frontend.std`` from some of the clips, if missing.

    Raises:
        ValueError: only one of the two is set, or the clips hold no frame or no sound.
    """
    front = recipe.frontend
    if front.mean is not None and front.std is not None:
        return recipe
    if front.mean is not None or front.std is not None:
        raise ValueError("set both frontend.mean and frontend.std, or neither")
    filterbank = build_filterbank(recipe)
    shift = hop_from_ms(finest_shift(recipe), recipe.data.sample_rate)
    keys = random_bits(0, 0, torch.from_numpy(dataset.clip_ids), "statistics", 1)[:, 0]
    count, total, squares = 0, 0.0, 0.0
    for index in keys.argsort()[:clips].tolist():
        frames = filterbank([dataset.waveform(index)], frame_shift=shift).frames.double()
        count += frames.numel()
        total += frames.sum().item()
        squares += frames.square().sum().item()
    variance = squares / count - (total / count) ** 2 if count else 0.0
    if variance <= 0:
        raise ValueError(
            "the training clips are all silent or shorter than a frame; set frontend.mean and "
            "frontend.std to train on them nevertheless"
        )
    mean, std = total / count, math.sqrt(variance)
    return replace(recipe, frontend=replace(front, mean=round(mean, 4), std=round(std, 4)))


def fit(
    recipe: Recipe, run_dir: str | os.PathLike, *, resume: bool = False, quiet: bool = False
) -> nn.Module:
    """Trains a model and keeps everything of the run in a directory.

    After each epoch the state is saved; a run that was stopped or killed resumes from there and
    goes on as if nothing had happened.

    Args:
        recipe: all settings.
        run_dir: see :mod:`fastast.train.run`.
        resume: go on with the run in ``run_dir`` (or begin it, if there is none).
        quiet: show no progress.

    Returns:
        The trained method, in evaluation mode.

    Raises:
        ValueError: settings or data that do not fit together, or ``run_dir`` holds a run and
            ``resume`` is not set.
        FloatingPointError: the loss is not finite.
    """
    run, config = RunDirectory(run_dir), recipe.train
    resumed = run.checkpoint_path.exists()
    if resumed and not resume:
        raise ValueError(
            f"{run.path} holds a run already; resume it (--resume), or choose another --run-dir"
        )
    device = pick_device(config.device)
    bf16 = device.type == "cuda" if config.bf16 is None else config.bf16
    compiled = device.type == "cuda" if config.compile is None else config.compile

    state = run.load_checkpoint() if resumed else None
    if state is not None:
        started = Recipe.from_dict(state["recipe"])
        check_same_recipe(started, recipe, run)
        recipe = replace(recipe, frontend=started.frontend)  # with the statistics measured then
    data = load_data(recipe.data)
    identity = {
        "class_names": data.train.class_names,
        "train": data.train.digest(),
        "validation": data.validation.digest() if data.validation else "",
    }
    if state is not None and state["data"] != identity:
        raise ValueError(
            f"the clips in {recipe.data.root} are not those that {run.path} was started with; "
            "restore them, or choose another --run-dir"
        )
    recipe = measure_statistics(recipe, data.train)
    torch.manual_seed(config.seed)
    method = build_method(recipe, len(data.train.class_names)).to(device)
    geometry = method.model.geometry
    optimizer = make_optimizer(method, config.lr, config.weight_decay)
    first_epoch = step = tokens = 0
    if state is None:
        run.start(recipe)
    else:
        method.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch, step, tokens = state["epoch"], state["step"], state["tokens"]
        run.rewind(first_epoch)

    training = make_loader(
        recipe,
        data.train,
        geometry,
        training=True,
        fixed_shapes=compiled,
        pin_memory=device.type == "cuda",
    )
    validation = make_loader(recipe, data.validation, geometry) if data.validation else None
    train_step = torch.compile(method, fullgraph=True) if compiled else method

    with Progress(run.path.name, quiet=quiet) as progress:
        for epoch in range(first_epoch, config.epochs):
            if share_done(config, epoch, tokens) >= 1:
                break
            method.train()
            meter = Meter(device)
            num_batches = training.num_batches(epoch)
            for index, batch in enumerate(training.epoch(epoch)):
                done = share_done(config, epoch + index / num_batches, tokens)
                if done >= 1:
                    break
                lr = config.lr * warmup_cosine(done, config.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                meter.count(batch)
                tokens += batch.num_tokens
                batch = batch.to(device, non_blocking=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = train_step(batch)["loss"]
                loss.backward()
                norm = nn.utils.clip_grad_norm_(method.parameters(), config.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                meter.add(loss.detach(), norm)
                progress.step(done, meter)

            record = {"epoch": epoch, "step": step, "tokens": tokens, "lr": lr} | meter.summary()
            if validation:
                score = evaluate(method, validation, device)
                record["validation_accuracy"] = score.accuracy
                record["validation_loss"] = score.loss
            check_finite(record, run)
            run.log(record)
            progress.epoch(share_done(config, epoch + 1, tokens), record)
            run.save_model(method.model, recipe, data.train.class_names)
            run.save_checkpoint(
                {
                    "recipe": recipe.to_dict(),
                    "data": identity,
                    "model": method.model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "epoch": epoch + 1,
                    "step": step,
                    "tokens": tokens,
                }
            )
    return method.eval()


def share_done(config: TrainConfig, epochs: float, tokens: int) -> float:
    """Share of a run that is over after so many epochs and tokens, whichever is nearer its end."""
    by_tokens = tokens / config.max_tokens if config.max_tokens else 0.0
    return min(1.0, max(epochs / config.epochs, by_tokens))


def check_finite(record: dict, run: RunDirectory) -> None:
    """Stops a run that has diverged, before its state replaces the last good one."""
    bad = {
        name: value
        for name, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if not bad:
        return
    kept = (
        f" {run.checkpoint_path} still holds the state before it"
        if run.checkpoint_path.exists()
        else ""
    )
    found = ", ".join(f"{name} is {value}" for name, value in bad.items())
    raise FloatingPointError(
        f"{found} in epoch {record['epoch']}: lower train.lr or check the data.{kept}"
    )


def check_same_recipe(old: Recipe, new: Recipe, run: RunDirectory) -> None:
    """Rejects resuming a run under settings that it was not started with.

    The device and the place of the data may be others; that the clips are the same is checked
    by their digest.
    """
    if new.frontend.mean is None or new.frontend.std is None:  # measured when the run began
        new = replace(
            new, frontend=replace(new.frontend, mean=old.frontend.mean, std=old.frontend.std)
        )
    before, after = old.to_dict(), new.to_dict()
    changed = [
        f"{part}.{name}: {before[part][name]} -> {after[part][name]}"
        for part in before
        for name in before[part]
        if before[part][name] != after[part][name]
        and (part, name) not in (("train", "device"), ("data", "root"))
    ]
    if changed:
        raise ValueError(
            f"{run.path} was started with other settings ({'; '.join(changed)}); "
            "resume with the old ones, or choose another --run-dir"
        )


class Meter:
    """Rates, loss and gradient norm of an epoch; the latter two stay on the device till asked."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = time.perf_counter()
        self.clips = self.tokens = self.rows = self.batches = 0
        self.seconds = 0.0
        self.loss = self.norm = torch.zeros((), device=device)

    def count(self, batch) -> None:
        """Notes what a batch holds."""
        self.clips += batch.num_clips
        self.seconds += batch.audio_seconds
        self.tokens += batch.num_tokens
        self.rows += batch.grid.num_rows

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Notes the loss of a step and the norm of its gradient before clipping."""
        self.loss = self.loss + loss
        self.norm = self.norm + norm
        self.batches += 1

    def summary(self) -> dict:
        """The epoch in numbers. Waits for the device."""
        loss, norm = (x.item() / max(self.batches, 1) for x in (self.loss, self.norm))
        elapsed = time.perf_counter() - self.start
        summary = {
            "loss": loss,
            "gradient_norm": norm,
            "seconds": elapsed,
            "clips_per_s": self.clips / elapsed,
            "tokens_per_s": self.tokens / elapsed,
            "audio_hours_per_s": self.seconds / 3600 / elapsed,
            "padding": 1 - self.tokens / max(self.rows, 1),
        }
        if self.device.type == "cuda":
            summary["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return summary
