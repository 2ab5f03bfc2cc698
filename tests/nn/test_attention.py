"""The attention modules against the textbook forms, clip by clip."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast import TokenBudget
from fastast.nn import AttentionPool, MeanPool, PackedAttention
from tests.testing import GEOMETRIES, Geometry

HEADS, DIM = 3, 24
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
every_scale = pytest.mark.parametrize("scale", [None, 1.0], ids=["default-scale", "unscaled"])


def stream(geometry: Geometry, dtype=torch.float64) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(geometry.rows, DIM, dtype=dtype, requires_grad=True)


def randomised(module: nn.Module, dtype=torch.float64) -> nn.Module:
    """The module with weights large enough to matter, biases included."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=DIM**-0.5)
    return module.to(dtype)


def gradients(loss: Tensor, x: Tensor, module: nn.Module) -> dict[str, Tensor]:
    named = {"x": x, **dict(module.named_parameters())}
    grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, grads, strict=True))


def check(module: nn.Module, x: Tensor, actual: Tensor, expected: Tensor, atol: float) -> None:
    """Compares outputs, and the gradients of the input and of all parameters."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    if actual.numel():
        weights = torch.randn_like(actual)
        torch.testing.assert_close(
            gradients((weights * actual).sum(), x, module),
            gradients((weights * expected).sum(), x, module),
            rtol=0,
            atol=atol,
        )


@every_geometry
@every_scale
def test_packed_attention_is_multi_head_attention_of_each_clip(geometry, scale):
    module, x = randomised(PackedAttention(DIM, HEADS, scale=scale)), stream(geometry)
    # The stock function has one scale; another is a factor on the queries.
    factor = 1.0 if scale is None else scale * (DIM // HEADS) ** 0.5
    weight, bias = module.qkv.weight, module.qkv.bias
    weight = torch.cat([factor * weight[:DIM], weight[DIM:]])
    bias = torch.cat([factor * bias[:DIM], bias[DIM:]])
    proj = module.proj
    expected = [
        F.multi_head_attention_forward(
            *3 * [x[clip]], DIM, HEADS, weight, bias, None, None, False, 0.0, proj.weight, proj.bias
        )[0]
        for clip in geometry.clips
        if clip.stop > clip.start
    ]
    actual = module(x, geometry.segments)
    if expected:
        check(module, x, actual[: geometry.used], torch.cat(expected), 1e-10)
    assert torch.equal(actual[geometry.used :], proj.bias.expand_as(actual[geometry.used :]))


def masked_attention_pool(module: AttentionPool, x: Tensor, clips: list[slice]) -> Tensor:
    """Learned queries over a padded batch of keys and values, with the padding masked."""
    lengths = torch.tensor([clip.stop - clip.start for clip in clips])
    padded = nn.utils.rnn.pad_sequence([x[clip] for clip in clips], batch_first=True)
    valid = torch.arange(padded.shape[1]) < lengths[:, None]

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (HEADS, -1)).transpose(-2, -3)  # [..., heads, length, head_dim]

    q, k, v = heads(module.q(module.query[None])), heads(module.k(padded)), heads(module.v(padded))
    scores = (module.scale * q @ k.mT).masked_fill(~valid[:, None, None], -torch.inf)
    return module.proj((scores.softmax(-1) @ v).squeeze(2).flatten(1))


@every_geometry
@every_scale
def test_attention_pool_is_masked_multi_head_attention(geometry, scale):
    module, x = randomised(AttentionPool(DIM, HEADS, scale=scale)), stream(geometry)
    assert module.scale == pytest.approx(scale or (DIM / HEADS) ** -0.5)
    pooled = module(x, geometry.segments)
    filled = (geometry.segments.lengths > 0).tolist()
    clips = [clip for clip, full in zip(geometry.clips, filled, strict=True) if full]
    if clips:
        expected = masked_attention_pool(module, x, clips)
        check(module, x, pooled[torch.tensor(filled)], expected, 1e-10)
    assert pooled.isfinite().all()  # on empty segments as well


@every_geometry
def test_mean_pool_is_the_mean(geometry):
    x = stream(geometry)
    expected = [x[clip].sum(0) / max(clip.stop - clip.start, 1) for clip in geometry.clips]
    module = MeanPool()
    check(module, x, module(x, geometry.segments), torch.stack(expected), 1e-12)


@pytest.mark.parametrize(
    "module",
    [PackedAttention(DIM, HEADS), AttentionPool(DIM, HEADS), MeanPool()],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(module, dtype):
    """In bfloat16 under autocast, from either input dtype, with gradients in float32."""
    geometry = Geometry.of([5, 0, 17, 17, 9], TokenBudget(64, 6, 32))
    module, x = randomised(copy.deepcopy(module), torch.float32), stream(geometry, torch.float32)
    filled = geometry.segments.lengths > 0
    rows = slice(geometry.used) if isinstance(module, PackedAttention) else filled
    expected = module(x, geometry.segments)[rows]
    weights = torch.randn_like(expected)
    expected_grads = gradients((weights * expected).sum(), x, module)

    with torch.autocast("cpu", torch.bfloat16):
        actual = module(x.to(dtype), geometry.segments)[rows]
    actual_grads = gradients((weights * actual).sum(), x, module)
    assert actual.dtype == (dtype if isinstance(module, MeanPool) else torch.bfloat16)
    for name, grad in {**actual_grads, "output": actual.float()}.items():
        other = expected if name == "output" else expected_grads[name]
        assert grad.dtype == torch.float32
        assert (grad - other).norm() <= 0.02 * other.norm(), name


@pytest.mark.parametrize("module", [PackedAttention, AttentionPool])
def test_wrong_heads_say_so(module):
    with pytest.raises(ValueError, match=r"dim \(24\) must be a multiple of num_heads \(5\)"):
        module(DIM, 5)


def test_state_dict_is_that_of_a_vision_transformer():
    shapes = {name: tuple(x.shape) for name, x in PackedAttention(DIM, HEADS).state_dict().items()}
    assert shapes == {
        "qkv.weight": (3 * DIM, DIM),
        "qkv.bias": (3 * DIM,),
        "proj.weight": (DIM, DIM),
        "proj.bias": (DIM,),
    }


def test_pooling_ignores_what_a_key_bias_would_add():
    geometry = GEOMETRIES["odd-sizes"]
    module, x = randomised(AttentionPool(DIM, HEADS)), stream(geometry)
    biased = copy.deepcopy(module)
    biased.k = nn.Linear(DIM, DIM).double()
    biased.k.weight = module.k.weight
    expected = masked_attention_pool(biased, x, geometry.clips)
    torch.testing.assert_close(module(x, geometry.segments), expected, rtol=0, atol=1e-10)
