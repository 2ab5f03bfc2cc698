"""The supervised objective, from waveforms to gradients."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

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
