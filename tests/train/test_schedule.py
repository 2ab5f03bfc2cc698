"""Learning rates and weight decays against torch's schedulers and the originals' formulas."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.optim import lr_scheduler

from fastast.train.optim import OptimConfig, make_optimizer
from fastast.train.schedule import Schedule, cosine
from tests.ssl_golden import SslGolden

DOCS = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def presets() -> dict[str, OptimConfig]:
    """The recipes that the documentation lists, by the name of their section and row."""
    found = {}
    for section in re.split(r"^#### ", DOCS.read_text().split("\n### Averaged")[0], flags=re.M)[1:]:
        title = section.splitlines()[0]
        common = yaml.safe_load(re.search(r"```yaml\n(.*?)```", section, re.S)[1])
        rows = re.findall(r"^\| (.*?) \| `(\{.*\})` \|$", section, re.M) or [("", "{}")]
        for name, differences in rows:
            found[f"{title}: {name}"] = OptimConfig(**common | yaml.safe_load(differences))
    return found


PRESETS = presets()


def preset(*words: str) -> OptimConfig:
    (config,) = (c for name, c in PRESETS.items() if all(word in name for word in words))
    return config


def rates(config: OptimConfig, epochs: int, steps: int) -> list[float]:
    """The learning rate at each step of a run."""
    schedule = Schedule(config)
    return [
        schedule.lr(step=step, epoch=step / steps, done=step / (epochs * steps))
        for step in range(epochs * steps)
    ]


def torch_rates(lr: float, count: int, make, per_epoch: int = 1) -> list[float]:
    """The learning rate that a scheduler of torch sets at each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, found = make(optimizer), []
    for step in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % per_epoch == 0:
            scheduler.step()
    return found


def same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-20)


def test_every_documented_recipe_is_valid():
    assert len(PRESETS) == 18
    for name, config in PRESETS.items():
        lr = np.array(rates(config, epochs=40, steps=30))
        assert 0 < lr.max() <= config.lr * (1 + 1e-12) and lr.min() >= 0, name
    # All settings but those of the default's own are used by a documented recipe.
    for name, value in vars(OptimConfig()).items():
        if name not in ("head_lr", "warmup_every", "patience"):
            assert any(getattr(config, name) != value for config in PRESETS.values()), name


def test_cosine_against_torch():
    config = OptimConfig(lr=3e-4, min_lr=1e-5, warmup=0)
    expected = torch_rates(3e-4, 60, lambda o: lr_scheduler.CosineAnnealingLR(o, 60, eta_min=1e-5))
    same(rates(config, 6, 10), expected)
    assert Schedule(config).lr(step=60, epoch=6, done=1.0) == 1e-5  # reached at the end, exactly
    assert cosine(0.996, 1.0, 0.5) == pytest.approx(0.998, rel=1e-15)


def test_default_is_a_tenth_of_warmup_and_a_cosine_to_zero():
    schedule = Schedule(OptimConfig())
    for done in np.linspace(0, 1, 101):
        expected = done / 0.1 if done < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9)
        same(schedule.lr(step=0, epoch=0, done=done), 5e-4 * expected)
    assert schedule.weight_decay(done=0.7) == 0.05


def test_audio_mae():
    config, steps = preset("Audio-MAE", "AudioSet, 256"), 7
    expected = []
    for iteration in range(100 * steps):
        epoch = iteration / steps
        if epoch < 10:
            expected.append(2e-4 * epoch / 10)
        else:
            fall = 0.5 * (1 + math.cos(math.pi * (epoch - 10) / 90))
            expected.append(1e-6 + (2e-4 - 1e-6) * fall)
    same(rates(config, 100, steps), expected)


def test_asit():
    config, steps = preset("ASiT"), 5
    total, warm = 100 * steps, 10 * steps
    i = np.arange(total - warm)
    fall = 1e-6 + 0.5 * (2.5e-4 - 1e-6) * (1 + np.cos(np.pi * i / len(i)))
    found = rates(config, 100, steps)
    same(found[warm:], fall)
    same(found[:warm], 2.5e-4 * np.arange(warm) / warm)
    decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * np.arange(total) / total))
    same([Schedule(config).weight_decay(done=j / total) for j in range(total)], decay)


def test_asit_s_code(shared_dir):
    fixture = SslGolden(shared_dir, "asit_schedules")
    config, steps = preset("ASiT"), 100
    settings = fixture.case["constructor_args"]
    decays = [Schedule(config).weight_decay(done=index / 10000) for index in range(10000)]
    fixture.check("weight_decay", np.array(decays)[settings["weight_decay"]["indices"]])
    # Its warm-up ends at the peak, a step before ours does.
    stored, indices = fixture.arrays["lr"], np.array(settings["lr"]["indices"])
    found = np.array(rates(config, 100, steps))[indices]
    after = indices >= 10 * steps
    assert after.sum() == 4
    np.testing.assert_allclose(found[after], stored[after], rtol=1e-9)
    np.testing.assert_allclose(found[~after], stored[~after] * 999 / 1000, rtol=1e-9)


@pytest.mark.parametrize(
    ("words", "first", "every", "gamma"),
    [(("AudioSet: AST, Flexi",), 2, 1, 0.5), (("balanced AudioSet: AST",), 10, 5, 0.5)],
)
def test_ast_as_its_code_runs(words, first, every, gamma):
    """MultiStepLR by epochs; during the warm-up the rate is overwritten every 50 steps."""
    config, steps, epochs = preset(*words), 703, 22
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = lr_scheduler.MultiStepLR(optimizer, list(range(first, 1000, every)), gamma)
    (group,), expected = optimizer.param_groups, []
    for step in range(epochs * steps):
        if step <= 1000 and step % 50 == 0:
            group["lr"] = step / 1000 * config.lr
        expected.append(group["lr"])
        if (step + 1) % steps == 0:
            optimizer.step()
            scheduler.step()
    config.warmup_every = 50
    same(rates(config, epochs, steps), expected)
    config.warmup_every = 1
    found = rates(config, epochs, steps)
    same(found[:1000], config.lr * np.arange(1000) / 1000)
    same(found[1000:], expected[1000:])


def test_steps_against_multistep():
    config = preset("ESC-50: SSAST")
    make = lambda o: lr_scheduler.MultiStepLR(o, list(range(6, 1000)), 0.85)  # noqa: E731
    same(rates(config, 50, 4), torch_rates(1e-4, 200, make, per_epoch=4))


def test_epic_sounds():
    steps = 5
    rise = torch_rates(1e-4, 10, lambda o: lr_scheduler.LinearLR(o, 0.01, 1.0, total_iters=10))
    flat = [1e-4] * (28 * steps)
    same(rates(preset("EPIC", "as the code runs"), 30, steps), rise + flat)
    flat[8 * steps : 18 * steps] = [5e-6] * (10 * steps)
    flat[18 * steps :] = [1e-6] * (10 * steps)
    same(rates(preset("EPIC", "as written"), 30, steps), rise + flat)


def test_hts_at():
    factors = [0.02, 0.05] + [0.1] * 9 + [0.05] * 10 + [0.02] * 10 + [0.03] * 4
    same(rates(preset("HTS-AT"), 35, 3), np.repeat(factors, 3) * 1e-3)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("min_lr", [0.0, 2e-6])
def test_plateau_against_torch(mode, min_lr):
    config = OptimConfig(
        lr=1e-4, warmup=0, schedule="plateau", gamma=0.5, patience=2, min_lr=min_lr
    )
    rng = np.random.default_rng(3)
    trend = np.linspace(0.2, 0.5, 40)
    metrics = (trend if mode == "max" else 1 - trend) + rng.uniform(-0.1, 0.1, 40)
    metrics[[0, 7, 8]] = math.nan
    # At last it goes the right way, but too slowly for most to be an improvement.
    sign = 1 if mode == "max" else -1
    metrics = np.append(metrics, (0.5 + sign * 0.3) * (1 + sign * 2e-5 * np.arange(9)))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    oracle = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, factor=0.5, patience=2, min_lr=min_lr
    )
    schedule, seen = Schedule(config, mode), set()
    for metric in metrics:
        schedule.observe(metric)
        oracle.step(metric)
        expected = optimizer.param_groups[0]["lr"]
        same(schedule.lr(step=0, epoch=0, done=0), expected)
        seen.add(expected)
    assert len(seen) > 3
    assert min_lr == 0 or min(seen) == min_lr


def test_plateau_is_resumed():
    config = OptimConfig(schedule="plateau", patience=1)
    metrics = [0.3, 0.2, 0.1, 0.31, 0.3, math.nan, 0.2, 0.25, 0.2]
    cuts = [0, 0, 1, 1, 1, 2, 2, 3, 3]
    for end in range(len(metrics)):
        whole, resumed = Schedule(config), Schedule(config)
        for metric in metrics[:end]:
            whole.observe(metric)
        resumed.load_state_dict(whole.state_dict())
        for expected, metric in zip(cuts[end:], metrics[end:], strict=True):
            resumed.observe(metric)
            assert resumed.cuts == expected


def test_other_schedules_ignore_metrics():
    schedule = Schedule(OptimConfig(schedule="constant", warmup=0, patience=0))
    for _ in range(5):
        schedule.observe(0.0)
    assert schedule.lr(step=0, epoch=0, done=0) == 5e-4


def test_warmup_in_steps_or_epochs_ends_the_cosine_where_a_share_does():
    share = rates(OptimConfig(warmup=0.2), 10, 12)
    same(rates(OptimConfig(warmup=24, warmup_unit="steps"), 10, 12), share)
    same(rates(OptimConfig(warmup=2, warmup_unit="epochs"), 10, 12), share)


def test_warmup_of_an_irregular_run():
    """Epochs of unequal numbers of steps, and tokens that end the run early: one rise, one fall."""
    lengths = np.random.default_rng(0).integers(20, 60, 10)
    tokens = np.cumsum(np.random.default_rng(1).uniform(0.2, 2, lengths.sum()))
    schedule = Schedule(OptimConfig(warmup=70, warmup_unit="steps", min_lr=1e-5))
    found, step = [], 0
    for epoch, length in enumerate(lengths):
        for index in range(length):
            done = tokens[step] / tokens[-1]
            found.append(schedule.lr(step=step, epoch=epoch + index / length, done=done))
            step += 1
    same(found[:70], 5e-4 * np.arange(70) / 70)
    same(found[70], 5e-4)
    assert (np.diff(found[70:]) < 0).all() and found[-1] == 1e-5


def test_run_within_its_warmup():
    schedule = Schedule(OptimConfig(warmup=100, warmup_unit="steps"))
    same(schedule.lr(step=50, epoch=0, done=1.0), 2.5e-4)
    assert schedule.lr(step=100, epoch=1, done=1.0) == 5e-4


def test_apply_sets_each_group():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    config = OptimConfig(weight_decay=0.04, weight_decay_end=0.4)
    optimizer = make_optimizer(model, config)
    optimizer.param_groups[1]["lr_scale"] = 0.25
    lr = Schedule(config).apply(optimizer, step=5, epoch=1.0, done=0.5)
    assert lr == Schedule(config).lr(step=5, epoch=1.0, done=0.5)
    decaying, vectors = optimizer.param_groups
    assert decaying["lr"] == lr and vectors["lr"] == 0.25 * lr
    assert decaying["weight_decay"] == pytest.approx(0.22) and vectors["weight_decay"] == 0
