"""The supervised objective, from waveforms to gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastast.methods import Supervised
from fastast.train import build_method, load_data, make_loader
from fastast.train.loop import measure_statistics
from tests.testing import poisoned_memory


@pytest.fixture
def setting(recipe):
    data = load_data(recipe.data).train
    recipe.frontend.freq_mask = 8
    recipe = measure_statistics(recipe, data)
    torch.manual_seed(0)
    return build_method(recipe, 2), recipe, data


def test_fixed_shapes_change_nothing(setting):
    method, recipe, data = setting
    exact, padded = (
        make_loader(recipe, data, method.model.geometry, training=True, fixed_shapes=fixed)
        for fixed in (False, True)
    )
    for small, large in zip(exact.epoch(0), padded.epoch(0), strict=True):
        assert small.clip_ids.tolist() == large.clip_ids[: small.num_clips].tolist()
        expected, found = method(small), method(large)
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(
            found["logits"][: small.num_clips], expected["logits"], rtol=1e-4, atol=1e-5
        )


def test_dead_rows_and_fresh_memory_are_never_read(setting):
    method, recipe, data = setting
    loader = make_loader(recipe, data, method.model.geometry, training=True, fixed_shapes=True)
    batch = next(loader.epoch(0))
    method(batch)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    with poisoned_memory():
        method(batch)["loss"].backward()
    for name, parameter in method.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_augments_in_training_alone(setting):
    method, recipe, data = setting
    loader = make_loader(recipe, data, method.model.geometry)
    first, second = next(loader.epoch(0)), next(loader.epoch(1))
    with torch.no_grad():
        method.train()
        assert not torch.equal(method(first)["logits"], method(second)["logits"])
        method.eval()
        assert torch.equal(method(first)["logits"], method(second)["logits"])


def test_one_graph_serves_every_batch(setting):
    """From int16 samples to the loss: no break, and no recompilation in 50 ragged batches."""
    method, recipe, data = setting
    loader = make_loader(recipe, data, method.model.geometry, training=True, fixed_shapes=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(method, fullgraph=True, backend=counter)
    seen = 0
    for epoch in range(50):
        for batch in loader.epoch(epoch):
            compiled = step(batch)
            compiled["loss"].backward()
            seen += 1
            if seen in (1, 20, 50):
                torch.testing.assert_close(compiled, method(batch), rtol=1e-4, atol=1e-5)
        if seen >= 50:
            break
    assert seen >= 50
    assert counter.frame_count == 1


class _Fixed(torch.nn.Module):
    """A model that knows its answer."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, spectrograms, grid):
        return self.logits


def _loss(logits, targets, clip_ids, denominator=1.0, **settings):
    batch = SimpleNamespace(
        targets=targets,
        clip_ids=clip_ids,
        loss_denominator=torch.tensor(denominator),
        grid=None,
    )
    return Supervised(_Fixed(logits), lambda batch: None, **settings)(batch)["loss"]


def test_cross_entropy_of_classes_and_of_shares():
    logits, ids = torch.randn(5, 4), torch.tensor([7, 3, 9, -1, -1])
    classes = torch.tensor([2, 0, 1, -100, -100])
    log_p = logits.double().log_softmax(1)
    expected = -(log_p[0, 2] + log_p[1, 0] + log_p[2, 1]) / 2.5
    torch.testing.assert_close(_loss(logits, classes, ids, 2.5), expected.float())

    shares = torch.zeros(5, 4)
    shares[0, 2], shares[0, 1], shares[1, 0], shares[2, 1] = 0.7, 0.3, 1.0, 1.0
    expected = -(0.7 * log_p[0, 2] + 0.3 * log_p[0, 1] + log_p[1, 0] + log_p[2, 1]) / 2.5
    torch.testing.assert_close(_loss(logits, shares, ids, 2.5), expected.float())


def test_binary_cross_entropy_of_classes_and_of_any_number_of_them():
    logits, ids = torch.randn(4, 3), torch.tensor([7, 3, 9, -1])
    hot = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0.2, 0.8, 0], [0, 0, 0]])
    p = logits.double().sigmoid()
    each = -(hot * p.log() + (1 - hot) * (1 - p).log()).mean(1)
    found = _loss(logits, hot, ids, 3.0, loss="binary_cross_entropy")
    torch.testing.assert_close(found, (each[:3].sum() / 3).float())

    classes = torch.tensor([2, -100, 1, -100])
    hot = torch.nn.functional.one_hot(classes.clamp(min=0), 3)
    each = -(hot * p.log() + (1 - hot) * (1 - p).log()).mean(1)
    found = _loss(logits, classes, ids, 3.0, loss="binary_cross_entropy")
    torch.testing.assert_close(found, ((each[0] + each[2]) / 3).float())


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_what_counts_for_nothing_has_no_gradient(loss):
    logits = torch.randn(3, 4)
    logits[1:] = torch.nan
    method = Supervised(_Fixed(logits), lambda batch: None, loss=loss)
    batch = SimpleNamespace(
        targets=torch.tensor([1, -100, -100]),
        clip_ids=torch.tensor([0, -1, -1]),
        loss_denominator=torch.tensor(1.0),
        grid=None,
    )
    method(batch)["loss"].backward()
    gradient = method.model.logits.grad
    assert gradient[0].abs().sum() > 0
    assert torch.equal(gradient[1:].nan_to_num(), torch.zeros(2, 4))


def test_losses_that_make_no_sense(setting):
    _, recipe, _ = setting
    with pytest.raises(ValueError, match="loss must be"):
        Supervised(_Fixed(torch.zeros(1, 1)), None, loss="hinge")
    with pytest.raises(ValueError, match="label_smoothing is for"):
        Supervised(
            _Fixed(torch.zeros(1, 1)), None, loss="binary_cross_entropy", label_smoothing=0.1
        )
    recipe.train.loss = "cross_entropy"
    with pytest.raises(ValueError, match=r"train\.loss is cross_entropy, which takes one class"):
        build_method(recipe, 2, multi_label=True)
    with pytest.raises(ValueError, match="no labels to learn"):
        build_method(recipe, 0)


def test_mixed_batches_compile_into_one_graph(setting):
    method, recipe, data = setting
    recipe.augment.mixup, recipe.augment.roll, recipe.augment.noise = 0.5, True, 0.1
    method = build_method(recipe, 2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(method, backend=counter, fullgraph=True)
    torch._dynamo.reset()
    loader = make_loader(recipe, data, method.model.geometry, training=True, fixed_shapes=True)
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            found = compiled(batch)["loss"]
            torch.testing.assert_close(found, method(batch)["loss"], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
