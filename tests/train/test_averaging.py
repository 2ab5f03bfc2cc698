"""Averages of weights against float64."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastast.train.averaging import EMA, EpochMean, average_files


def model_of(seed, dtype=torch.float32):
    """Parameters, floating-point and integer buffers."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    model(torch.randn(7, 3))
    model[1].num_batches_tracked += seed
    return model.to(dtype)


def float64(model):
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def assert_close(weights, expected, rtol=1e-6):
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(value.double().numpy(), expected[name], rtol, atol=1e-7)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_ema(decay, warmup):
    ema = EMA(model_of(0), decay, warmup=warmup)
    expected = float64(model_of(0))
    assert_close(ema.weights(), expected)
    for t in range(12):
        model = model_of(t + 1)
        ema.update(model)
        d = min(decay, (1 + t) / (10 + t)) if warmup else decay
        for name, value in float64(model).items():
            expected[name] = d * expected[name] + (1 - d) * value
        expected["1.num_batches_tracked"] = t + 2  # an integer: the latest
        assert_close(ema.weights(), expected)
    assert ema.updates == 12


def test_ema_of_a_bfloat16_model_is_float32():
    """In bfloat16 an average of 1 would never leave 1 by steps of 0.0001."""
    model = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = EMA(model, 0.9999)
    nn.init.zeros_(model.weight)
    for _ in range(100):
        ema.update(model)
    average = ema.weights()["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((2, 2), 0.9999**100), rtol=1e-5, atol=0)
    model.load_state_dict(ema.weights())
    assert model.weight.dtype == torch.bfloat16


def test_an_average_is_apart_from_the_model():
    model = model_of(0)
    ema = EMA(model, 0.5)
    before = float64(model)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    assert_close(ema.weights(), before)
    assert not any(value.requires_grad for value in ema.weights().values())


@pytest.mark.parametrize(("first", "last"), [(1, None), (6, 25), (3, 3)])
def test_epoch_mean(first, last):
    mean = EpochMean(model_of(0), first, last)
    for epoch in range(1, 28):
        mean.update(model_of(epoch), epoch)
        if epoch < first:
            with pytest.raises(ValueError, match=f"before the end of epoch {first}"):
                mean.weights()
    last = last or 27
    states = [float64(model_of(epoch)) for epoch in range(first, last + 1)]
    expected = {name: np.mean([state[name] for state in states], 0) for name in states[0]}
    expected["1.num_batches_tracked"] = last + 1
    assert mean.updates == len(states)
    assert_close(mean.weights(), expected)


@pytest.mark.parametrize("make", [lambda m: EMA(m, 0.9, warmup=True), lambda m: EpochMean(m, 2)])
def test_resumes_bit_for_bit(make, tmp_path):
    def run(average, epochs):
        for epoch in epochs:
            model = model_of(epoch)
            average.update(model) if isinstance(average, EMA) else average.update(model, epoch)
        return average

    whole = run(make(model_of(0)), range(1, 9)).weights()
    for cut in (1, 2, 5):  # of the mean, before the first epoch that counts, and after it
        torch.save(run(make(model_of(0)), range(1, cut)).state_dict(), tmp_path / "state.pt")
        resumed = make(model_of(99))
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for name, value in run(resumed, range(cut, 9)).weights().items():
            assert torch.equal(value, whole[name]), name


def test_states_of_another_model_are_rejected():
    ema = EMA(model_of(0), 0.9)
    fewer = nn.Sequential(nn.Linear(3, 5))
    wider = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    for other in (fewer, wider):
        with pytest.raises(ValueError, match="other weights than this model: .* such as"):
            ema.load_state_dict(EMA(other, 0.9).state_dict())
    assert_close(ema.weights(), float64(model_of(0)))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1.0"):
        EMA(model_of(0), 1.0)
    for first, last in ((0, None), (3, 2)):
        with pytest.raises(ValueError, match="1 <= first <= last"):
            EpochMean(model_of(0), first, last)


def files_of(folder, models):
    paths = [folder / f"{index}.safetensors" for index in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        save_file(model.state_dict(), path)
    return paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_of_files(tmp_path, dtype):
    models = [model_of(seed, dtype) for seed in (3, 9, 4)]
    states = [float64(model) for model in models]
    expected = {name: np.mean([state[name] for state in states], 0) for name in states[0]}
    expected["1.num_batches_tracked"] = 5
    weights = average_files(files_of(tmp_path, models))
    assert_close(weights, expected, rtol=1e-6 if dtype == torch.float32 else 2**-8)
    for name, value in models[0].state_dict().items():
        assert weights[name].dtype == value.dtype, name
    model_of(0, dtype).load_state_dict(weights)
    (one,) = files_of(tmp_path, models[:1])
    for name, value in average_files([one]).items():
        assert torch.equal(value, load_file(one)[name]), name


def test_files_that_cannot_be_averaged(tmp_path):
    good, damaged, noise, empty = files_of(tmp_path, [model_of(seed) for seed in range(4)])
    damaged.write_bytes(damaged.read_bytes()[:-20])
    noise.write_bytes(b"no weights at all, but longer than a header's size")
    empty.write_bytes(b"")
    for path in (damaged, noise, empty, tmp_path / "missing", tmp_path):
        for paths in ([good, path], [path, good]):
            with pytest.raises(ValueError, match=f"{path} cannot be read as a safetensors file"):
                average_files(paths)
    with pytest.raises(ValueError, match="paths is empty"):
        average_files([])
    state = model_of(0).state_dict()
    for change in (
        {"extra": torch.zeros(2)},
        {"0.weight": torch.zeros(5, 4)},
        {"0.weight": state["0.weight"].half()},
    ):
        save_file(state | change, damaged)
        name = next(iter(change))
        with pytest.raises(ValueError, match=f"{damaged} holds other .* {good}: 1 .* as {name};"):
            average_files([good, damaged])
