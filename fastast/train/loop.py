"""The training loop."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastast.data import AudioDataset, AudioError, Batch, PackedLoader
from fastast.ops import dither_keys, hop_from_ms
from fastast.random import random_bits
from fastast.train.averaging import EMA, EpochMean, average_files
from fastast.train.build import (
    Splits,
    build_filterbank,
    build_method,
    finest_shift,
    learns_classes,
    load_data,
    make_loader,
)
from fastast.train.distributed import Ranks, joined
from fastast.train.evaluate import Score, evaluate, loss_weight_of
from fastast.train.init import start_from
from fastast.train.log import RunLog
from fastast.train.meter import Meter
from fastast.train.optim import clip_gradients, make_optimizer
from fastast.train.phases import (
    adapt_state,
    load_moments,
    parameter_names,
    phase_recipe,
    phases_of,
)
from fastast.train.progress import Progress
from fastast.train.recipe import PhaseConfig, Recipe, TrainConfig
from fastast.train.run import RunDirectory
from fastast.train.schedule import Schedule
from fastast.train.signals import StopRequest
from fastast.train.stopping import EarlyStopping

FREE_TO_CHANGE = {
    ("data", "root"),
    ("data", "bad_files"),
    ("train", "device"),
    ("train", "accumulate"),
    ("train", "workers"),
    ("train", "checkpoint_minutes"),
    ("train", "log_every"),
    ("train", "log_clips"),
}
"""What a run may be resumed with that it was not started with. It changes no number, but for the
device, whose arithmetic is its own."""

SPENT = ("clips", "audio_hours", "flops", "seconds")
"""What the log adds up over a phase, all ranks together."""

MOST_BAD = 10
"""Clips of an epoch that may be unreadable, however few there are."""


def fit(
    recipe: Recipe, run_dir: str | os.PathLike, *, resume: bool = False, quiet: bool = False
) -> nn.Module:
    """Trains a model, phase after phase, and keeps everything of the run in a directory.

    The state is saved after each epoch, every few minutes, and when the run is asked to stop
    (SIGTERM, Ctrl-C). A run that was stopped or killed resumes from there and goes on as if
    nothing had happened: on the same machine with the same number of processes, every loss is
    the same to the bit (compiled runs on GPUs excepted).

    Under torchrun, the processes share the batches of each step, and the loss is the mean over
    the clips of all of them.

    Args:
        recipe: all settings.
        run_dir: see :mod:`fastast.train.run`.
        resume: go on with the run in ``run_dir`` (or begin it, if there is none).
        quiet: show no progress.

    Returns:
        The trained method with the weights that the recipe keeps, in evaluation mode.

    Raises:
        ValueError: settings or data that do not fit together, or ``run_dir`` holds a run and
            ``resume`` is not set.
        FloatingPointError: a loss is not finite.
        AudioError: a file cannot be read, and ``data.bad_files`` is ``stop``.
    """
    run, data = RunDirectory(run_dir), None
    with joined() as ranks:
        while True:
            training = _Training(recipe, run, ranks, resume, quiet, data)
            method = training.run_to_the_end()
            if training.is_last:
                return method
            # The next phase begins as a run that was stopped here would.
            resume, data = True, training.data
            ranks.from_first(None)  # the checkpoint is written
            if training.compiled:
                torch.compiler.reset()  # what is compiled holds on to this phase's weights
            del training, method


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``"auto"`` is a GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def pick_workers(config: TrainConfig, device: torch.device, local_ranks: int) -> int:
    """Processes that decode for one rank."""
    if config.workers is not None:
        return config.workers
    return min(8, (os.cpu_count() or 1) // local_ranks) if device.type == "cuda" else 0


def pick_metric(recipe: Recipe, multi_label: bool) -> str:
    """What is best on validation.

    Raises:
        ValueError: a metric that the method and the data do not have.
    """
    metric = recipe.train.metric
    if not learns_classes(recipe):
        known = ("loss", "accuracy") if recipe.train.method == "ssast" else ("loss",)
        if metric is not None and metric not in known:
            raise ValueError(
                f"train.metric is {metric}, but train.method {recipe.train.method} learns no "
                f"classes: use {' or '.join(known)}"
            )
        return metric or "loss"
    if metric == "accuracy" and multi_label:
        raise ValueError("train.metric is accuracy, but clips have several labels: use mAP")
    return metric or ("mAP" if multi_label else "accuracy")


def measure_statistics(recipe: Recipe, dataset: AudioDataset, clips: int = 500) -> Recipe:
    """Fills in ``frontend.mean`` and ``frontend.std`` from some of the clips, if missing.

    They are of what is trained on, so with dither where there is any.

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
    clip_ids = torch.from_numpy(dataset.clip_ids)
    keys = random_bits(0, 0, clip_ids, "statistics", 1)[:, 0]
    count, total, squares = 0, 0.0, 0.0
    for index in keys.argsort()[:clips].tolist():
        try:
            waveform = dataset.waveform(index)
        except AudioError:
            if recipe.data.bad_files == "stop":
                raise
            continue
        noise = dither_keys(0, 0, clip_ids[index, None])
        frames = filterbank([waveform], frame_shift=shift, dither_keys=noise).frames.double()
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


class _Training:
    """A phase of a run under way: what it is made of, and how far the run has come.

    Attributes:
        phase: which one, counted from 0.
        whole: the recipe of all phases; ``recipe`` is this one's.
        epoch: epochs done, in all phases.
        epoch_step: steps done of the next one.
        step: steps done in all.
        tokens: that they have seen, on all ranks.
        begun: ``epoch``, ``step`` and ``tokens`` when the phase began.
        spent: what the phase's epochs have cost, for the log.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        ranks: Ranks,
        resume: bool,
        quiet: bool,
        data: Splits | None = None,
    ) -> None:
        self.run, self.ranks = run, ranks
        self.quiet = quiet or not ranks.is_first
        self.progress = Progress(run.path.name, quiet=self.quiet)
        self.device = pick_device(recipe.train.device, ranks.local_rank)
        on_gpu = self.device.type == "cuda"
        self.bf16 = on_gpu if recipe.train.bf16 is None else recipe.train.bf16
        self.compiled = on_gpu if recipe.train.compile is None else recipe.train.compile
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

        state = self._saved_state(resume)
        if state is not None:
            started = Recipe.from_dict(state["recipe"])
            check_same_recipe(started, recipe, run)
            recipe = replace(recipe, frontend=started.frontend)  # with the statistics measured then
        for number in range(len(phases_of(recipe))):  # what is wrong with any shows at once
            build_filterbank(phase_recipe(recipe, number))
        if data is None:
            data = load_data(recipe.data, ("train", "validation"))
            for name in ("train", "validation"):
                if part := getattr(data, name):
                    self.progress.say(f"{name}: {part.summary()}")
        self.data, self.identity = data, data_identity(data)
        self._check_ranks_agree(recipe, state)
        if state is not None and state["data"] != self.identity:
            raise ValueError(
                f"the clips in {recipe.data.root} are not those that {run.path} was started with; "
                "restore them, or choose another --run-dir"
            )
        if state is None:
            recipe = ranks.from_first(
                measure_statistics(recipe, data.train) if ranks.is_first else None
            )
        self.whole, self.phase = recipe, 0
        entering = False
        if state is not None:
            entering = state["phase_over"] and state["phase"] + 1 < len(phases_of(recipe))
            self.phase = state["phase"] + entering
        recipe = phase_recipe(recipe, self.phase)
        self.recipe, self.config = recipe, recipe.train
        config = self.config
        self.class_names, self.multi_label = data.train.class_names, data.train.multi_label
        self.metric = pick_metric(recipe, self.multi_label)
        self._check_validation(data)
        if len(phases_of(self.whole)) > 1:
            self.progress.say(self._describe_phase())

        torch.manual_seed(config.seed)
        self.method = build_method(recipe, len(self.class_names), multi_label=self.multi_label)
        if state is None and recipe.model.init is not None:
            start_from(self.method.model, recipe.model.name, recipe.model.init)
        self.method.to(self.device)
        self.loss_weight = loss_weight_of(self.method)
        self.loader = self._training_loader(recipe)
        self.validation = None
        if data.validation is not None:
            self.validation = self._make_loader(recipe, data.validation)

        self.optimizer = make_optimizer(self.method, recipe.optim)
        mode = "min" if self.metric == "loss" else "max"
        self.schedule = Schedule(recipe.optim, mode)
        self.stopping = EarlyStopping(config.patience, mode) if config.patience else None
        self.average: EMA | EpochMean | None = None
        if config.average == "ema":
            self.average = EMA(self.method.model, config.ema_decay, warmup=True)
        elif config.average == "epochs":
            self.average = EpochMean(self.method.model, config.average_from)
        self.best: list[tuple[float, str]] = []
        self.meter = Meter(self.device, ranks)
        self.epoch = self.epoch_step = self.step = self.tokens = 0
        self.begun = {"epoch": 0, "step": 0, "tokens": 0}
        self.spent = dict.fromkeys(SPENT, 0.0)
        self.lr, self.over = 0.0, False
        self.clips: list[int] = []
        self.left_out: dict[str, str] = {}
        if entering:
            self._enter(state)
        elif state is not None:
            self._restore(state)
        elif ranks.is_first:
            run.start(self.whole)
        self.log = RunLog(run, self.step, enabled=ranks.is_first)
        if ranks.is_first:
            run.note_left_out([*data.train.left_out, *(data.validation or data.train).left_out])

        forward = (
            self._compile(len(self.loader.planner.geometries)) if self.compiled else self.method
        )
        self.forward = forward
        if ranks.size > 1:
            self.forward = DistributedDataParallel(
                forward, [self.device] if on_gpu else None, broadcast_buffers=False
            )
            self._settle_buckets()

    def _make_loader(self, recipe: Recipe, dataset: AudioDataset, **options) -> PackedLoader:
        return make_loader(
            recipe,
            dataset,
            self.method.model.geometry,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
            workers=pick_workers(self.config, self.device, self.ranks.local_size),
            pin_memory=self.device.type == "cuda",
            **options,
        )

    def _training_loader(self, recipe: Recipe) -> PackedLoader:
        return self._make_loader(recipe, self.data.train, training=True, fixed_shapes=self.compiled)

    def _compile(self, patch_sizes: int) -> nn.Module:
        """The method, to be compiled at its first step; anew for each patch size, and where the
        time resolution glides for each that gives other shapes."""
        resolutions = 1 if self.phase_config.to is None else self.config.epochs
        limits = torch._dynamo.config  # some code is compiled for them all
        limits.recompile_limit = max(limits.recompile_limit, patch_sizes * resolutions)
        # The shapes of a patch size never change but for that.
        dynamic = None if patch_sizes == 1 else False
        return torch.compile(self.method, fullgraph=True, dynamic=dynamic)

    @property
    def phase_config(self) -> PhaseConfig:
        """The phase under way, as the recipe has it."""
        return phases_of(self.whole)[self.phase]

    @property
    def is_last(self) -> bool:
        """Whether no phase follows."""
        return self.phase + 1 == len(phases_of(self.whole))

    def run_to_the_end(self) -> nn.Module:
        """Trains until the phase is over."""
        self.saved_at = time.monotonic()
        with (
            StopRequest() as self.stop,
            self.progress,
            contextlib.closing(self.log),
            contextlib.ExitStack() as leaving,
        ):
            # An error's traceback holds this run, and with it the processes that decode.
            leaving.callback(self._close_loaders)
            # A run may have been stopped after the last step, before the end of its epoch.
            while not self._phase_over():
                self._train_epoch()
                self._finish_epoch()
            return self._finish() if self.is_last else self.method

    def _close_loaders(self) -> None:
        for loader in filter(None, (self.loader, self.validation)):
            loader.close()

    def _train_epoch(self) -> None:
        self.method.train()
        if self.phase_config.to is not None:  # each epoch has a time resolution of its own
            self.loader.close()
            epoch = self.epoch - self.begun["epoch"]
            self.loader = self._training_loader(phase_recipe(self.whole, self.phase, epoch))
        plan = self.loader.planner.plan(self.epoch)
        num_steps, step_tokens = plan.num_steps, plan.step_tokens
        batches = self.loader.epoch(self.epoch, self.epoch_step)
        with contextlib.closing(batches):
            waiting = self.meter.waits(batches)
            while self.epoch_step < num_steps:
                done = self._share_done(self.epoch_step / num_steps)
                if done >= 1:
                    break
                epoch = self.epoch - self.begun["epoch"] + self.epoch_step / num_steps
                step = self.step - self.begun["step"]
                self.lr = self.schedule.apply(self.optimizer, step=step, epoch=epoch, done=done)
                self._train_step([next(waiting) for _ in range(self.config.accumulate)])
                self.tokens += int(step_tokens[self.epoch_step])
                self.step += 1
                self.epoch_step += 1
                if self.step % self.config.log_every == 0:
                    self._log_steps()
                    self.progress.step(self._share_done(self.epoch_step / num_steps), self.meter)
                self._save_if_due(self.config.checkpoint_minutes)
        self._log_steps()

    def _train_step(self, batches: list[Batch]) -> None:
        loss, centering = torch.zeros((), device=self.device), []
        # Counted, not planned: clips that could not be read are not there. DDP takes the mean over
        # the ranks, and the sum is wanted.
        weight = self.ranks.sum(torch.tensor(sum(map(self.loss_weight, batches))))
        denominator = max(int(weight), 1) / self.ranks.size
        for index, batch in enumerate(batches):
            self.meter.count(batch, self._flops(batch))
            if self.config.log_clips:
                self.clips += batch.clip_ids[batch.clip_ids >= 0].tolist()
            self.left_out.update(batch.left_out)
            batch = batch.with_denominator(denominator).to(self.device, non_blocking=True)
            last = index == len(batches) - 1
            # Gradients go over the ranks once, after the last batch.
            wait = self.ranks.size > 1 and not last
            with self.forward.no_sync() if wait else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    out = self.forward(batch)
                out["loss"].backward()
            loss = loss + out["loss"].detach()
            if "centering" in out:
                centering.append(out["centering"])
        norm = clip_gradients(self.method.parameters(), self.recipe.optim)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._share_statistics()
        if centering:
            done = self._share_done(self.epoch_step / self.loader.num_steps(self.epoch))
            self.method.after_step(self.ranks.sum(sum(centering)), done=done)
        if isinstance(self.average, EMA):
            self.average.update(self.method.model)
        self.meter.add(loss, norm)

    def _share_statistics(self) -> None:
        """Lets all ranks go on from the mean of what their batches did to running statistics.

        All then validate with the same ones, and a resumed run has them from the checkpoint.
        """
        if self.ranks.size == 1:
            return
        kept = self.method.model.state_dict()
        buffers = [
            buffer
            for name, buffer in self.method.model.named_buffers()
            if name in kept and buffer.is_floating_point()
        ]
        if buffers:
            mean = self.ranks.sum(torch.cat([x.flatten() for x in buffers])) / self.ranks.size
            parts = mean.split([x.numel() for x in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def _log_steps(self) -> None:
        """Writes a line about the steps since the last one."""
        self._pull()
        if not self.meter.has_window:
            return
        self._check_readable()
        record = {"epoch": self.epoch, "step": self.step, "tokens": self.tokens, "lr": self.lr}
        record |= self.meter.window()
        if self.config.log_clips:
            record["clips"] = sorted(sum(self.ranks.gather(self.clips), []))
            self.clips.clear()
        self.log.write("train", record)

    def _pull(self) -> None:
        """Fetches the losses from the device and stops a run that has diverged.

        That comes before every checkpoint, so that a bad state never replaces the last good one.
        """
        pulled = self.meter.pull()
        for step, (loss, norm) in enumerate(pulled, self.step - len(pulled)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                path = self.run.checkpoint_path
                kept = f" {path} still holds the state before it" if path.exists() else ""
                raise FloatingPointError(
                    f"loss is {loss} and gradient_norm is {norm} in step {step} (epoch "
                    f"{self.epoch}): lower optim.lr or check the data.{kept}"
                )

    def _finish_epoch(self) -> None:
        """Validates, logs and saves."""
        if self.validation is not None:
            self._save_if_due(after_minutes=1.0)  # validation may take long
        self.epoch, self.epoch_step = self.epoch + 1, 0
        record = {"epoch": self.epoch - 1, "phase": self.phase, "step": self.step}
        record |= {"tokens": self.tokens, "lr": self.lr} | self.meter.summary()
        for name in SPENT:
            self.spent[name] += record[name] or 0
        if isinstance(self.average, EpochMean):
            self.average.update(self.method.model, self.epoch - self.begun["epoch"])
        if self.validation is not None:
            averaged = self.average.weights() if isinstance(self.average, EMA) else None
            with exchanged_weights(self.method.model, averaged):
                score = self._validate()
            record |= {f"validation_{name}": value for name, value in score.to_dict().items()}
            self.left_out.update(score.left_out)
            self._judge(score)
        self.log.write("epoch", record)
        if self._phase_over():
            self._log_phase(record["peak_memory_gib"])
        self.progress.epoch(self._share_done(), record)
        self.meter = Meter(self.device, self.ranks)
        self._save_model()
        self._save()

    def _judge(self, score: Score) -> None:
        """Lets the plateau schedule, early stopping and the list of best epochs see a score."""
        value = score.loss if self.metric == "loss" else score.metrics.get(self.metric)
        # The first rank decides: on other machines, the last bit may be another.
        value = self.ranks.from_first(math.nan if value is None else value)
        self.schedule.observe(value)
        if self.stopping is not None and self.stopping.update(value):
            self.over = True
        until = self.phase_config.until
        if until is not None and (value < until if self.metric == "loss" else value > until):
            self.over = True
        if self.config.average == "best" and math.isfinite(value):
            rank = value if self.metric == "loss" else -value
            name = f"epoch-{self.epoch:04}.safetensors"
            self.best = sorted([*self.best, (rank, name)])[: self.config.average_best]
            if self.ranks.is_first and (rank, name) in self.best:
                self.run.save_best(self.method.model.state_dict(), name)

    def _finish(self) -> nn.Module:
        """Puts the weights that the recipe keeps into the method, and measures them."""
        kept = self._kept_weights()
        if kept is not None:
            self.method.model.load_state_dict(kept)
            if self.validation is not None and self.config.average in ("epochs", "best"):
                score = self._validate()
                record = {f"validation_{name}": value for name, value in score.to_dict().items()}
                self.log.write("final", {"epoch": self.epoch - 1, "step": self.step} | record)
        left_out = self.run.note_left_out([]) if self.ranks.is_first else 0
        if left_out:
            self.progress.say(
                f"{left_out} files could not be used; they are listed, with the reasons, in "
                f"{self.run.left_out_path}"
            )
        return self.method.eval()

    def _validate(self) -> Score:
        title = None if self.quiet else "validation"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return evaluate(self.method, self.validation, self.device, title=title)

    def _kept_weights(self) -> dict[str, Tensor] | None:
        """The teacher, where there is one, or the average that the recipe asks for; None for the
        last weights."""
        if (teacher := getattr(self.method, "teacher", None)) is not None:
            return teacher.state_dict()
        if isinstance(self.average, EMA) or (self.average is not None and self.average.updates):
            return self.average.weights()
        if self.best:
            return average_files(self.run.best_paths(name for _, name in self.best))
        return None

    def _save_model(self) -> None:
        if self.ranks.is_first:
            self.run.save_model(
                self._kept_weights() or self.method.model.state_dict(),
                self.recipe,
                self.class_names,
                multi_label=self.multi_label,
            )

    def _save_if_due(self, after_minutes: float) -> None:
        """Saves within an epoch, when the time has come or the run is to stop."""
        due = time.monotonic() - self.saved_at >= 60 * after_minutes
        due, stop = self.ranks.any(due, self.stop.signal is not None)
        if due or stop:
            self._save()
        if stop:
            self.progress.say(f"stopped after step {self.step}; resume to go on")
            self.stop.leave()

    def _save(self) -> None:
        self._pull()
        meter = self.meter.state_dict()
        clips, left_out = zip(*self.ranks.gather((self.clips, self.left_out)), strict=True)
        if self.ranks.is_first:
            self.run.note_left_out(entry for part in left_out for entry in part.items())
            self.run.save_checkpoint(
                {
                    "recipe": self.whole.to_dict(),
                    "phase": self.phase,
                    "phase_over": self._phase_over(),
                    "begun": self.begun,
                    "spent": self.spent,
                    "data": self.identity,
                    "batches_per_step": self.loader.planner.packing.group,
                    "model": self.method.model.state_dict(),
                    "method": self._beside_the_model(),
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "stopping": self.stopping.state_dict() if self.stopping else None,
                    "average": self.average.state_dict() if self.average else None,
                    "best": [list(entry) for entry in self.best],
                    "epoch": self.epoch,
                    "epoch_step": self.epoch_step,
                    "step": self.step,
                    "tokens": self.tokens,
                    "lr": self.lr,
                    "over": self.over,
                    "meter": meter,
                    "clips": list(clips),
                    "log_size": self.log.size(),
                    "rng": torch.get_rng_state(),
                }
            )
            self.run.keep_best(name for _, name in self.best)
        self.saved_at = time.monotonic()

    def _beside_the_model(self) -> dict[str, Tensor]:
        """What the method has learnt that is not in the model: a teacher and its centres."""
        state = self.method.state_dict()
        return {
            name: x for name, x in state.items() if not name.startswith(("model.", "frontend."))
        }

    def _saved_state(self, resume: bool) -> dict | None:
        exists = self.run.checkpoint_path.exists()
        if exists and not resume:
            raise ValueError(
                f"{self.run.path} holds a run already; resume it (--resume), or choose another "
                "--run-dir"
            )
        return self.run.load_checkpoint() if exists else None

    def _enter(self, state: dict) -> None:
        """Begins a phase with what the one before it has learned."""
        classes, labels = len(self.class_names), {"multi_label": self.multi_label}
        adapted = adapt_state(state, self.whole, self.phase, classes, **labels)
        self.method.model.load_state_dict(adapted["model"])
        self.method.load_state_dict(adapted["method"], strict=False)
        if adapted["moments"]:
            names = parameter_names(self.method, self.recipe)
            load_moments(self.optimizer, adapted["moments"], names)
        for name in ("epoch", "step", "tokens", "lr"):
            setattr(self, name, state[name])
        self.begun = {name: state[name] for name in self.begun}
        if self.ranks.is_first:
            self.run.sweep()
            self.run.cut_log(state["log_size"])

    def _restore(self, state: dict) -> None:
        group = self.loader.planner.packing.group
        if state["batches_per_step"] != group:
            raise ValueError(
                f"{self.run.path} was started with {state['batches_per_step']} batches per step "
                f"and cannot go on with {group}: choose train.accumulate so that it makes as many "
                "with the number of processes"
            )
        self.method.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.stopping is not None:
            self.stopping.load_state_dict(state["stopping"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best = [tuple(entry) for entry in state["best"]]
        for name in ("epoch", "epoch_step", "step", "tokens", "lr", "over", "begun", "spent"):
            setattr(self, name, state[name])
        self.meter.load_state_dict(state["meter"])
        if self.ranks.is_first:
            self.clips = sum(state["clips"], [])
            self.run.sweep()
            self.run.cut_log(state["log_size"])
        torch.set_rng_state(state["rng"])

    def _share_done(self, within_epoch: float = 0.0) -> float:
        """Share of the phase that is over, by whichever limit is nearest."""
        config, begun = self.config, self.begun
        done = [(self.epoch - begun["epoch"] + within_epoch) / config.epochs]
        if config.max_steps:
            done.append((self.step - begun["step"]) / config.max_steps)
        if config.max_tokens:
            done.append((self.tokens - begun["tokens"]) / config.max_tokens)
        return min(1.0, max(done))

    def _phase_over(self) -> bool:
        """Whether the phase's last epoch is over; one that is under way is finished first."""
        return not self.epoch_step and (self.over or self._share_done() >= 1)

    def _describe_phase(self) -> str:
        phase = self.phase_config
        text = f"phase {self.phase + 1} of {len(self.whole.phases)}"
        glide = "" if phase.to is None else f", then down to {phase.to:g} times"
        return f"{text}: {phase.compression:g} times coarser in time{glide}, by {phase.by}"

    def _log_phase(self, peak_memory_gib: float) -> None:
        """Writes what the phase has cost."""
        phase = self.phase_config
        record = {"phase": self.phase, "compression": phase.compression, "by": phase.by}
        if phase.to is not None:
            record["to"] = phase.to
        record |= {"step": self.step, "epochs": self.epoch - self.begun["epoch"]}
        record |= {"steps": self.step - self.begun["step"]}
        record |= {"tokens": self.tokens - self.begun["tokens"]} | self.spent
        record |= {"flops": self.spent["flops"] or None, "peak_memory_gib": peak_memory_gib}
        self.log.write("phase", record)

    def _flops(self, batch: Batch) -> float:
        """Of this rank's part of a step; 0 where the method does not say."""
        count = getattr(self.method, "flops", None)
        return float(count(batch)) if count else 0.0

    def _check_readable(self) -> None:
        """Stops a run most of whose clips cannot be read."""
        totals = self.meter.totals()
        if totals["left_out"] > max(totals["clips"], MOST_BAD):
            found = [entry for part in self.ranks.gather(self.left_out) for entry in part.items()]
            source, reason = found[-1]
            raise ValueError(
                f"{totals['left_out']:.0f} clips of epoch {self.epoch} cannot be read and "
                f"{totals['clips']:.0f} can, the last of the former being {source}: {reason}; is "
                "the disk there?"
            )

    def _check_ranks_agree(self, recipe: Recipe, state: dict | None) -> None:
        """Every rank must see the same files: the same data, and the same run directory."""
        step = None if state is None else state["step"]
        everyone = self.ranks.gather((self.identity, recipe.to_dict(), step))
        for what, values in zip(
            ("data", "recipe", "checkpoint"), zip(*everyone, strict=True), strict=True
        ):
            for rank, value in enumerate(values):
                if value != values[0]:
                    raise ValueError(
                        f"process {rank} sees another {what} than process 0: data and run "
                        "directory must be the same on all machines"
                    )

    def _settle_buckets(self) -> None:
        """Lets DDP order its gradients for good, before the first step.

        After a first backward pass it puts them into the order in which they came; sums over more
        than two ranks depend on it, and a resumed run would take its first step in the other order.
        """
        batch = self.loader.silent_batch().to(self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.forward(batch)["loss"]
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _check_validation(self, data: Splits) -> None:
        asks = {
            "train.average='best'": self.config.average == "best",
            "train.patience": self.config.patience is not None,
            "phases.until": any(phase.until is not None for phase in self.whole.phases),
            "optim.schedule='plateau'": self.recipe.optim.schedule == "plateau",
        }
        for setting, asked in asks.items():
            if asked and data.validation is None:
                raise ValueError(f"{setting} needs clips to validate on: set data.validation")


@contextlib.contextmanager
def exchanged_weights(model: nn.Module, weights: dict[str, Tensor] | None) -> Iterator[None]:
    """Puts other weights into a model for a while; None leaves its own."""
    if weights is None:
        yield
        return
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(own)


def data_identity(data: Splits) -> dict:
    """What tells whether the clips are still the same."""
    return {
        "class_names": data.train.class_names,
        "train": data.train.digest(),
        "validation": data.validation.digest() if data.validation else "",
    }


def check_same_recipe(old: Recipe, new: Recipe, run: RunDirectory) -> None:
    """Rejects resuming a run under settings that it was not started with.

    What changes no number may differ (:data:`FREE_TO_CHANGE`); that the clips are the same is
    checked by themselves. Statistics that the recipe leaves open may have been measured.

    Raises:
        ValueError: naming what differs.
    """
    before, after = old.to_dict(), new.to_dict()
    phases = before.pop("phases"), after.pop("phases")
    for name in ("mean", "std"):
        if after["frontend"][name] is None:
            after["frontend"][name] = before["frontend"][name]
    changed = [
        f"{part}.{name}: {before[part][name]} -> {after[part][name]}"
        for part in before
        for name in before[part]
        if before[part][name] != after[part][name] and (part, name) not in FREE_TO_CHANGE
    ]
    if phases[0] != phases[1]:
        changed.append(f"phases: {phases[0]} -> {phases[1]}")
    if changed:
        raise ValueError(
            f"{run.path} was started with other settings ({'; '.join(changed)}); "
            "resume with the old ones, or choose another --run-dir"
        )
