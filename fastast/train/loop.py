"""The training loop."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace

import torch
from torch import nn

from fastast.data import AudioDataset
from fastast.train.evaluate import evaluate
from fastast.train.progress import Progress
from fastast.train.recipe import Recipe, build_method, load_data, make_loader
from fastast.train.run import RunDirectory
from fastast.train.schedule import make_optimizer, warmup_cosine


def pick_device(name: str) -> torch.device:
    """``"auto"`` is a GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@torch.inference_mode()
def measure_statistics(recipe: Recipe, dataset: AudioDataset, clips: int = 500) -> Recipe:
    """Fills in ``frontend.mean`` and ``frontend.std`` from some of the clips, if missing."""
    front = recipe.frontend
    if front.mean is not None and front.std is not None:
        return recipe
    probe = replace(recipe, frontend=replace(front, mean=0.0, std=0.5, fixed_seconds=None))
    probe.model = replace(probe.model, name="elastic_ast_tiny", stride=None)
    method = build_method(probe, 1).eval()
    chosen = dataset.subset(torch.randperm(len(dataset))[:clips].sort().values.numpy())
    count, total, squares = 0, 0.0, 0.0
    for batch in make_loader(probe, chosen, method.model.geometry).epoch(0):
        frames = method.frontend(batch).frames.double()
        count += frames.numel()
        total += frames.sum().item()
        squares += frames.square().sum().item()
    mean = total / count
    std = math.sqrt(squares / count - mean**2)
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
        check_same_recipe(Recipe.from_dict(state["recipe"]), recipe, run)
        recipe = Recipe.from_dict(state["recipe"])
    torch.manual_seed(config.seed)
    data = load_data(recipe.data, config.seed)
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

    with Progress(run.path.name, config.epochs, quiet=quiet) as progress:
        for epoch in range(first_epoch, config.epochs):
            if config.max_tokens and tokens >= config.max_tokens:
                break
            method.train()
            meter = Meter(device)
            num_batches = training.num_batches(epoch)
            for index, batch in enumerate(training.epoch(epoch)):
                done = (epoch + index / num_batches) / config.epochs
                if config.max_tokens:
                    done = max(done, tokens / config.max_tokens)
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
                nn.utils.clip_grad_norm_(method.parameters(), config.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                meter.add_loss(loss.detach())
                progress.step(epoch, (index + 1) / num_batches, meter)

            record = {"epoch": epoch, "step": step, "tokens": tokens, "lr": lr} | meter.summary()
            if not math.isfinite(record["loss"]):
                raise FloatingPointError(
                    f"the loss is {record['loss']} in epoch {epoch}: lower train.lr or check the "
                    f"data. The state before this epoch is in {run.checkpoint_path}; nothing of "
                    "it is lost"
                )
            if validation:
                score = evaluate(method, validation, device)
                record["validation_accuracy"] = score.accuracy
                record["validation_loss"] = score.loss
            run.log(record)
            progress.epoch(record)
            run.save_model(method.model, recipe, data.train.class_names)
            run.save_checkpoint(
                {
                    "recipe": recipe.to_dict(),
                    "model": method.model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "epoch": epoch + 1,
                    "step": step,
                    "tokens": tokens,
                }
            )
    return method.eval()


def check_same_recipe(old: Recipe, new: Recipe, run: RunDirectory) -> None:
    """Rejects resuming a run under settings that it was not started with."""
    if new.frontend.mean is None or new.frontend.std is None:  # measured when the run began
        new = replace(
            new, frontend=replace(new.frontend, mean=old.frontend.mean, std=old.frontend.std)
        )
    before, after = old.to_dict(), new.to_dict()
    changed = [
        f"{part}.{name}: {before[part][name]} -> {after[part][name]}"
        for part in before
        for name in before[part]
        if before[part][name] != after[part][name] and (part, name) != ("train", "device")
    ]
    if changed:
        raise ValueError(
            f"{run.path} was started with other settings ({'; '.join(changed)}); "
            "resume with the old ones, or choose another --run-dir"
        )


class Meter:
    """Rates and loss of an epoch. The loss stays on the device until it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = time.perf_counter()
        self.clips = self.tokens = self.rows = self.batches = 0
        self.seconds = 0.0
        self.loss = torch.zeros((), device=device)

    def count(self, batch) -> None:
        """Notes what a batch holds."""
        self.clips += batch.num_clips
        self.seconds += batch.audio_seconds
        self.tokens += batch.num_tokens
        self.rows += batch.grid.num_rows

    def add_loss(self, loss: torch.Tensor) -> None:
        """Notes the loss of a step."""
        self.loss = self.loss + loss
        self.batches += 1

    def summary(self) -> dict:
        """The epoch in numbers. Waits for the device."""
        loss = self.loss.item() / max(self.batches, 1)
        elapsed = time.perf_counter() - self.start
        summary = {
            "loss": loss,
            "seconds": elapsed,
            "clips_per_s": self.clips / elapsed,
            "tokens_per_s": self.tokens / elapsed,
            "audio_hours_per_s": self.seconds / 3600 / elapsed,
            "padding": 1 - self.tokens / max(self.rows, 1),
        }
        if self.device.type == "cuda":
            summary["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return summary
