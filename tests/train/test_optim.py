"""Parameter groups, optimisers and gradient clipping."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastast.models import create_model
from fastast.train.optim import (
    OptimConfig,
    clip_gradients,
    layer_ids,
    make_optimizer,
    parameter_groups,
)

SMALL = {"num_mels": 32, "patch_size": (16, 8), "dim": 16, "depth": 3, "num_heads": 2}


def small(name):
    """A small model, within what holds it in training."""
    settings = {"stride": (8, 8), "input_frames": 40} if name == "ast" else {}
    torch.manual_seed(0)
    return nn.ModuleDict({"model": create_model(f"{name}_tiny", 4, **SMALL, **settings)})


def by_name(model, groups):
    """The group of each parameter. Fails if one is in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert len(dict(listed)) == len(listed)
    return dict(listed)


BEFORE = {
    "ast": ["prefix", "patch_embed.proj.weight", "patch_embed.proj.bias", "positions.table"],
    "elastic_ast": [
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "positions.freq",
        "positions.time",
    ],
}
AFTER = {
    "ast": ["norm.weight", "norm.bias", "head.weight", "head.bias"],
    "elastic_ast": [
        "pool.query",
        *(f"pool.{name}" for name in ("q.weight", "q.bias", "k.weight", "v.weight", "v.bias")),
        "pool.proj.weight",
        "pool.proj.bias",
        *("norm.weight", "norm.bias", "head.weight", "head.bias"),
    ],
}
BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


@pytest.mark.parametrize("name", ["ast", "elastic_ast"])
def test_layer_ids(name):
    expected = dict.fromkeys(BEFORE[name], 0)
    for index, part in itertools.product(range(3), BLOCK):
        expected[f"trunk.blocks.{index}.{part}"] = index + 1
    expected |= dict.fromkeys(["trunk.norm.weight", "trunk.norm.bias", *AFTER[name]], 4)
    model = small(name)
    assert layer_ids(model["model"]) == expected
    assert layer_ids(model) == {f"model.{part}": layer for part, layer in expected.items()}
    trunk = model["model"].trunk
    assert layer_ids(trunk)["blocks.2.norm1.bias"] == 3


@pytest.mark.parametrize("name", ["ast", "elastic_ast"])
def test_every_parameter_is_in_one_group(name):
    model = small(name)
    for layer_decay, head_lr, decay_on in itertools.product(
        (1.0, 0.75), (1.0, 10.0), ("matrices", "weights", "all")
    ):
        config = OptimConfig(
            layer_decay=layer_decay, head_lr=head_lr, weight_decay_on=decay_on, weight_decay=0.1
        )
        groups = parameter_groups(model, config)
        assert len({(group["lr_scale"], group["decays"]) for group in groups}) == len(groups)
        found = by_name(model, groups)
        assert found.keys() == dict(model.named_parameters()).keys()
        for path, parameter in model.named_parameters():
            group, part = found[path], path.removeprefix("model.")
            layer = layer_ids(model["model"])[part]
            scale = layer_decay ** (4 - layer) * (head_lr if part in AFTER[name] else 1)
            assert group["lr_scale"] == pytest.approx(scale, rel=1e-12)
            assert group["lr"] == pytest.approx(5e-4 * scale, rel=1e-12)
            decays = parameter.ndim > 1
            if decay_on == "weights" and part in ("prefix", *BEFORE[name]):
                decays = part == "patch_embed.proj.weight"
            if decay_on == "all":
                decays = True
            assert group["decays"] is decays
            assert group["weight_decay"] == (0.1 if decays else 0.0)


def test_layer_decay_of_audio_mae():
    """0.75 to the power of 13 minus the layer, over twelve blocks."""
    model = create_model("ast_tiny", 4, **SMALL | {"depth": 12, "dim": 8}, stride=(8, 8))
    found = by_name(model, parameter_groups(model, OptimConfig(layer_decay=0.75)))
    for part, power in (("positions.table", 13), ("trunk.blocks.4.mlp.fc1.bias", 8)):
        assert found[part]["lr_scale"] == pytest.approx(0.75**power)
    assert found["trunk.norm.weight"]["lr_scale"] == found["head.weight"]["lr_scale"] == 1


def test_frozen_parameters_are_left_out():
    model = small("elastic_ast")
    model["model"].trunk.requires_grad_(False)
    model["model"].positions.time.requires_grad_(False)
    found = by_name(model, parameter_groups(model, OptimConfig(layer_decay=0.5)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained and "model.positions.freq" in found
    assert found["model.positions.freq"]["lr_scale"] == 0.5**4  # the depth is still known
    with pytest.raises(
        ValueError, match="nothing to train: all parameters of ModuleDict are frozen"
    ):
        make_optimizer(model.requires_grad_(False), OptimConfig())


def test_models_of_another_structure():
    for model, count in (
        (nn.Linear(3, 4), 0),
        (nn.ModuleList([small("ast"), small("elastic_ast")]), 2),
    ):
        assert len(make_optimizer(model, OptimConfig()).param_groups) == 2
        for setting in ({"layer_decay": 0.9}, {"head_lr": 2.0}):
            with pytest.raises(ValueError, match=f"one trunk, but .* has {count}"):
                make_optimizer(model, OptimConfig(**setting))


def steps(model, optimizer, inputs, count):
    """Trains a layer on its squared output."""
    for _ in range(count):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_optimisers_against_their_formulas(kind):
    """Adam in float64, with the decay in the gradient or apart from it."""
    config = OptimConfig(optimizer=kind, lr=0.01, betas=[0.95, 0.99], weight_decay=0.3)
    torch.manual_seed(1)
    model, inputs = nn.Linear(3, 2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in (weight, bias)]
    optimizer = make_optimizer(model, config)
    assert optimizer.defaults["fused"] is True
    steps(model, optimizer, inputs, 4)
    for t in range(1, 5):
        out = inputs @ weight.T + bias
        gradients = (2 * out.T @ inputs, 2 * out.sum(0))
        for p, g, m, decay in zip((weight, bias), gradients, moments, (0.3, 0), strict=True):
            if kind == "adam":
                g = g + decay * p
            else:
                p *= 1 - 0.01 * decay
            m[0] = 0.95 * m[0] + 0.05 * g
            m[1] = 0.99 * m[1] + 0.01 * g**2
            p -= 0.01 * (m[0] / (1 - 0.95**t)) / ((m[1] / (1 - 0.99**t)).sqrt() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.bias.detach(), bias, rtol=1e-12, atol=1e-12)


def test_optimiser_state_is_resumed_bit_for_bit():
    config = OptimConfig(layer_decay=0.75, head_lr=3.0, weight_decay_on="weights")

    def train(model, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    whole = small("elastic_ast")
    optimizer = make_optimizer(whole, config)
    train(whole, optimizer, range(3))
    resumed = copy.deepcopy(whole)
    again = make_optimizer(resumed, config)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(whole, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


def with_gradients(sizes=((3, 5), (7,), (2, 2, 2), ())):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (index - 1)
    parameters.insert(1, nn.Parameter(torch.zeros(3)))  # took no part
    return parameters


def gradients(parameters):
    return [p.grad.double() for p in parameters if p.grad is not None]


@pytest.mark.parametrize("clip", ["global", "per_tensor"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 3.0, 1e4])
def test_clipping_against_a_loop(clip, clip_norm):
    parameters = with_gradients()
    before = gradients(parameters)
    total = sum(g.square().sum() for g in before).sqrt()
    norm = clip_gradients(iter(parameters), OptimConfig(clip=clip, clip_norm=clip_norm))
    torch.testing.assert_close(norm.double(), total, rtol=1e-6, atol=0)
    for old, new in zip(before, gradients(parameters), strict=True):
        size = old.norm() if clip == "per_tensor" else total
        if clip_norm and size > clip_norm:
            old = old * clip_norm / size
        torch.testing.assert_close(new, old, rtol=2e-6, atol=0)
    assert parameters[1].grad is None


def test_clipping_without_gradients():
    assert clip_gradients([nn.Parameter(torch.zeros(3))], OptimConfig()) == 0


def test_a_gradient_that_is_not_finite_is_reported():
    for value in (torch.nan, torch.inf):
        parameters = with_gradients()
        parameters[0].grad[0, 0] = value
        assert not clip_gradients(parameters, OptimConfig()).isfinite()


@pytest.mark.parametrize("clip", ["global", "per_tensor"])
def test_clipping_asks_the_device_for_nothing(clip):
    """Fake tensors have no values: whatever reads one fails."""
    with FakeTensorMode():
        parameters = with_gradients(((3, 5), (7,)))
        with pytest.raises(DataDependentOutputException):
            parameters[0].grad.norm().item()
        assert clip_gradients(parameters, OptimConfig(clip=clip)).shape == ()


def test_settings_are_checked():
    for wrong, message in (
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adam, got 'sgd'"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant"),
        ({"clip": "norm"}, "clip must be one of global, per_tensor"),
        ({"weight_decay_on": "norms"}, "weight_decay_on must be one of"),
        ({"warmup_unit": "hours"}, "warmup_unit must be one of"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"betas": [0.9]}, "betas must be two numbers"),
        ({"betas": [0.9, 1.0]}, "betas must be in"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"weight_decay_end": -0.1}, "weight_decay_end"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"layer_decay": 1.1}, "layer_decay"),
        ({"head_lr": 0.0}, "head_lr"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"warmup": -1.0}, "warmup must be at least 0"),
        ({"warmup": 1000}, r"warmup must be a share, in \[0, 1\)"),
        ({"warmup_from": 2.0}, "warmup_from"),
        ({"warmup_every": 0, "warmup_unit": "steps"}, "warmup_every must be at least 1"),
        ({"warmup_every": 50}, "warmup_every must be 1 unless warmup_unit is 'steps'"),
        ({"min_lr": 1e-3}, r"min_lr must be in \[0, lr\], lr being 0.0005"),
        ({"milestone": -1}, "milestone must"),
        ({"milestone_every": 0}, "milestone_every"),
        ({"gamma": 0.0}, "gamma"),
        ({"patience": -1}, "patience"),
        ({"schedule": "table"}, "epoch_factors must be given with schedule 'table'"),
        ({"epoch_factors": [[1, 0.1]]}, "epoch_factors must be given with schedule 'table'"),
        ({"schedule": "table", "epoch_factors": [[2, 0.1], [1, 0.2]]}, "ascending"),
        ({"schedule": "table", "epoch_factors": [[2, 0.1, 0.3]]}, "pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            OptimConfig(**wrong)


def test_settings_on_the_command_line(capsys):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(OptimConfig, "optim")
    words = ["--optim.schedule=table", "--optim.epoch_factors=[[0, 0.1], [3, 0.01]]"]
    parsed = parser.parse_args([*words, "--optim.betas=[0.95, 0.999]", "--optim.warmup=0"])
    config = parser.instantiate(parsed).optim
    assert config == OptimConfig(
        schedule="table", epoch_factors=[[0, 0.1], [3, 0.01]], betas=[0.95, 0.999], warmup=0
    )
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in vars(OptimConfig()):
        # Each has a text of its own before its type and default.
        after = text.split(f"--optim.{name} ")[-1]
        explanation = after.split("(type:")[0].split(" ", 1)[-1]
        assert len(explanation) > 10, name
