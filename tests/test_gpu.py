"""The same results on a GPU, and no waiting for it. Needs torch and the native build alone."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastast import (
    MelFilterbank,
    Segments,
    Spectrograms,
    TokenBudget,
    create_model,
    create_pretraining_model,
)
from fastast.ops import frame_segments, info_nce, packed_attention_qkv, segment_pool
from tests.testing import ragged

pytestmark = pytest.mark.gpu

LENGTHS = [5, 0, 64, 1, 130, 64]
BUDGETS = pytest.mark.parametrize(
    "budget", [None, TokenBudget(300, 9, 256)], ids=["exact", "budget"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SMALL = {"num_mels": 32, "dim": 64, "depth": 2, "num_heads": 2}


def segments_and_rows(budget):
    segments = Segments.from_lengths(LENGTHS, budget)
    return segments, budget.tokens if budget else sum(LENGTHS)


def assert_within_twice_eager(found, eager, truth):
    """Error budget: twice that of the explicit formula in the same dtype, plus one rounding."""
    rounding = torch.finfo(eager.dtype).eps * truth.abs().max()
    allowed = 2 * (eager.double() - truth).abs().max() + rounding
    assert (found.double() - truth).abs().max() <= allowed


def run(op, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = op(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out))]


@BUDGETS
@DTYPES
@pytest.mark.parametrize("head_dim", [24, 64])
def test_attention(budget, dtype, head_dim):
    segments, rows = segments_and_rows(budget)
    on_gpu = segments.to("cuda")
    qkv = torch.randn(rows, 3, 3, head_dim, device="cuda").to(dtype)
    grad = torch.randn(rows, 3, head_dim, device="cuda").to(dtype)
    found = run(lambda x: packed_attention_qkv(x, on_gpu), [qkv], grad)
    eager = run(lambda x: packed_attention_qkv(x, on_gpu, backend="reference"), [qkv], grad)
    truth = run(
        lambda x: packed_attention_qkv(x, on_gpu, backend="reference"), [qkv.double()], grad
    )
    for parts in zip(found, eager, truth, strict=True):
        assert_within_twice_eager(*parts)


@BUDGETS
@DTYPES
def test_pool(budget, dtype):
    segments, rows = segments_and_rows(budget)
    on_gpu = segments.to("cuda")
    inputs = [torch.randn(rows, 64, device="cuda").to(dtype), torch.randn(4, 64, device="cuda") / 8]
    grad = torch.randn(segments.num_segments, 4, 64, device="cuda").to(dtype)
    found = run(lambda x, u: segment_pool(x, u, on_gpu), inputs, grad)
    eager = run(
        lambda x, u: segment_pool(x, u.to(dtype), on_gpu, backend="reference"), inputs, grad
    )
    truth = run(
        lambda x, u: segment_pool(x, u, on_gpu, backend="reference"),
        [x.double() for x in inputs],
        grad,
    )
    for parts in zip(found, eager, truth, strict=True):
        assert_within_twice_eager(*parts)


@BUDGETS
@DTYPES
def test_info_nce(budget, dtype):
    segments, rows = segments_and_rows(budget)
    on_gpu = segments.to("cuda")
    inputs = [torch.randn(rows, 64, device="cuda").to(dtype) / 4 for _ in range(2)]
    member = (torch.rand(rows, device="cuda") < 0.8) & on_gpu.row_mask(rows)
    grad = torch.randn(rows, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(lambda q, k: info_nce(q, k, on_gpu, member).loss, inputs, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    def reference(q, k):
        return info_nce(q, k, on_gpu, member, backend="reference").loss

    eager = run(reference, inputs, grad)
    truth = run(reference, [x.double() for x in inputs], grad)
    for parts in zip(found, eager, truth, strict=True):
        assert_within_twice_eager(*parts)


@pytest.mark.parametrize("name", ["elastic_ast_tiny", "ast_tiny", "ssast_patch_tiny"])
def test_models_agree_with_the_cpu(name):
    model = create_model(name, 5, **SMALL).double()
    clips = ragged([16, 40, 200, 32], 32)
    labels = torch.tensor([0, 1, 2, 3])
    on_gpu = copy.deepcopy(model).cuda()
    F.cross_entropy(model(clips), labels).backward()
    F.cross_entropy(on_gpu(clips.to("cuda")), labels.cuda()).backward()
    for (key, expected), found in zip(model.named_parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(found.grad.cpu(), expected.grad, rtol=1e-8, atol=1e-9, msg=key)


@pytest.mark.parametrize("attention", ["local", "global", "hybrid"])
def test_an_autoencoder_agrees_with_the_cpu(attention):
    decoder = {"decoder_dim": 32, "decoder_depth": 3, "decoder_heads": 2, "decoder_global": 1}
    kind = {"attention": attention, "window": 2, **decoder}
    model = create_pretraining_model("audio_mae_tiny", **kind, **SMALL).double()
    clips = ragged([16, 40, 200, 32], 32)
    grid = model.geometry.grid(clips.segments)
    found = {}
    for device in ("cpu", "cuda"):
        copied, table = copy.deepcopy(model).to(device), grid.to(device)
        ids = torch.arange(4, device=device)
        masked = copied.geometry.mask(table, copied.geometry, ids, seed=0, epoch=0)
        restored = copied(clips.to(device), masked, table)
        restored.prediction.square().sum().backward()
        gradients = [parameter.grad.cpu() for parameter in copied.parameters()]
        found[device] = [restored.prediction.detach().cpu(), restored.patches.cpu(), *gradients]
    for expected, value in zip(*found.values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9)


def test_filterbank_agrees_with_the_cpu():
    filterbank = MelFilterbank()
    clips = [0.1 * torch.randn(length) for length in (16000, 400, 399, 52000)]
    expected = filterbank(clips).frames
    found = filterbank.cuda()([clip.cuda() for clip in clips]).frames
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-3)


def test_a_compiled_step_never_waits():
    """Forward and backward, in one graph over ragged batches, without a host synchronisation."""
    filterbank = MelFilterbank(num_mels=32).cuda()
    model = create_model("elastic_ast_tiny", 5, **SMALL).cuda()
    tokens, frames = TokenBudget(400, 8, 400), TokenBudget(4000, 8, 4000)
    samples = 4000 * 160

    def make(lengths):
        offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        offsets = F.pad(offsets, (0, 8 - len(lengths)), value=int(offsets[-1]))
        shifts = torch.full((8,), 160, dtype=torch.int32)
        stream = frame_segments(offsets.diff().tolist(), shifts.tolist(), filterbank.plan, frames)
        grid = model.geometry.grid(stream, tokens)
        labels = torch.full((8,), -100)
        labels[: len(lengths)] = 1
        host = (torch.zeros(samples, dtype=torch.int16), offsets, shifts, labels)
        return [x.cuda() for x in host], stream.to("cuda"), grid.to("cuda")

    def loss(waveforms, offsets, shifts, labels, stream, grid):
        rows = filterbank(waveforms, offsets, shifts, stream, frames.tokens)
        return F.cross_entropy(model(Spectrograms(rows.frames, stream), grid), labels)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for index in range(20):
        tables, stream, grid = make([8000 + 400 * index] * (1 + index % 8))
        torch.cuda.synchronize()
        if index >= 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch._dynamo.config.patch(error_on_recompile=index >= 2):
                compiled(*tables, stream, grid).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
