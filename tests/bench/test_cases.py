"""What is measured: lengths, references, and the GPU's peers, built and compared on a CPU.

Those that have no CPU implementation must say so, and leave the others alone.
"""

from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from bench import peak
from bench.cases import (
    info_nce,
    mel_filterbank,
    mel_memory,
    op_memory,
    packed_attention,
    segment_pool,
)
from bench.cases.lengths import GPU_LENGTHS, GPU_TOKENS, segment_lengths
from bench.clock import CpuClock
from bench.peers import streams
from bench.peers.streams import Document
from bench.registry import Benchmark, Case, Settings, find
from bench.runner import measure
from fastast import Segments
from fastast.ops.packed_attention import packed_attention_reference

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EQUAL, MIXED = [16] * 8, [16, 16, 16, 100, 40]


def measured(build, dtype: torch.dtype = torch.float32) -> dict[str, dict]:
    """Rows by contender, of one repetition on the CPU."""
    case = Case("case", dtype, "tiny", {}, build)
    rows = measure(Benchmark("ops/toy", "", lambda s: []), case, CpuClock(), "cpu", 1)
    return {row["contender"]: row for row in rows}


@pytest.fixture
def small_flex(monkeypatch):
    """Not compiled, which takes long on a CPU, and on a short stream."""
    monkeypatch.setattr(packed_attention, "GPU_TOKENS", 256)
    monkeypatch.setattr(streams, "_compiled_flex", lambda: flex_attention)


@pytest.mark.parametrize("lengths", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_attention_s_gpu_peers(lengths, backward, small_flex):
    rows = measured(
        partial(packed_attention._build, CPU, torch.float32, lengths, 2, 24, backward, True)
    )
    names = ["fastast", "padded SDPA", "varlen_attn", "NestedTensor", "FlexAttention"]
    names += [f"padded SDPA, {backend}" for backend in packed_attention.BACKENDS]
    assert rows.keys() == {*names, *(["masked rows"] if lengths is MIXED else [])}
    for name in ("fastast", "padded SDPA", "padded SDPA, flash"):
        assert rows[name]["error"] < 1e-6
    for name in ("padded SDPA, cuDNN", "padded SDPA, efficient", "varlen_attn"):
        assert rows[name]["unavailable"]
        assert rows[name]["median_ms"] is None
    # FlexAttention has no backward on a CPU, and nested tensors a wrong one in torch 2.11.
    assert bool(rows["FlexAttention"]["unavailable"]) == backward
    if not backward:
        assert rows["NestedTensor"]["error"] < 1e-6
        assert rows["FlexAttention"]["error"] < 1e-6
        assert rows["FlexAttention"]["tokens"] == 256


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_attention_s_gpu_peers_on_a_gpu(lengths, monkeypatch):
    monkeypatch.setattr(packed_attention, "GPU_TOKENS", 512)
    build = partial(
        packed_attention._build, GPU, torch.bfloat16, lengths, 2, 64, backward=True, on_gpu=True
    )
    rows = measured(build, torch.bfloat16)
    for name in ("fastast", "padded SDPA", "padded SDPA, efficient", "varlen_attn"):
        assert rows[name]["error"] < 0.02, rows[name]
    assert rows["FlexAttention"]["error"] < 0.02, rows["FlexAttention"]


@pytest.mark.parametrize("lengths", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_pooling_s_gpu_peers_and_what_they_keep(lengths):
    rows = measured(partial(segment_pool._build, CPU, torch.float32, lengths, 48, 2, True, True))
    assert list(rows) == ["fastast", "padded SDPA", "varlen_attn", "loop"]
    assert rows["varlen_attn"]["unavailable"]
    assert 5 * rows["fastast"]["saved_bytes"] < rows["padded SDPA"]["saved_bytes"]
    many = segment_pool._build(CPU, torch.float32, [2] * 65, 48, 2, False, True)
    assert "loop" not in {contender.name for contender in many.contenders}


@pytest.mark.parametrize(
    ("in_dtype", "out_dtype"),
    [(torch.float32, torch.float32), (torch.int16, torch.bfloat16)],
    ids=["float32", "int16 to bfloat16"],
)
def test_the_filterbank_s_gpu_peers(in_dtype, out_dtype, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(mel_filterbank, "FEW_CLIPS", 1)
    batch = mel_filterbank.Batch(mel_filterbank._equal(2), in_dtype, out_dtype)
    rows = measured(partial(mel_filterbank.build, CPU, batch, True), out_dtype)
    assert list(rows)[:4] == ["fastast", "fastast, portable", "PyTorch", "PyTorch, compiled"]
    for row in list(rows.values())[:4]:
        assert row["error"] < (1e-5 if out_dtype == torch.float32 else 2**-8)
    transform = rows["MelSpectrogram"]  # or torchaudio is not there, which must do no harm either
    assert transform["unavailable"] or (transform["unchecked"] and transform["median_ms"])
    assert rows["fastast"]["bytes"] == sum(
        dtype.itemsize * size for dtype, size in ((in_dtype, 320_000), (out_dtype, 2 * 998 * 128))
    )


def test_a_ragged_filterbank_is_compared_with_as_many_frames_of_equal_clips():
    clips = [(3000, 10), (399, 10), (5000, 23), (16000, 40)]
    rows = measured(partial(mel_filterbank.build, CPU, mel_filterbank.Batch(clips), False))
    ours = rows["fastast"]
    assert ours["tokens"] == 17 + 0 + 13 + 25
    for name, bytes_in in (("equal clips", 4 * sum(n for n, _ in clips)), ("every 10 ms", 0)):
        row = rows[f"fastast, {name}"]
        assert row["tokens"] == ours["tokens"] and row["median_ms"] and row["unchecked"]
        if bytes_in:
            assert row["bytes"] == pytest.approx(ours["bytes"], rel=0.06)
        else:
            assert row["bytes"] < 0.8 * ours["bytes"]
    plan = mel_filterbank.MelPlan.kaldi()
    equal = mel_filterbank._equal_clips(55, 4, 160, plan)
    assert [plan.num_frames(length, 160) for length in equal] == [14, 14, 14, 13]
    alike = mel_filterbank.Batch([(3000, 10)] * 2)
    names = measured(partial(mel_filterbank.build, CPU, alike, False))
    assert "fastast, equal clips" not in names


def test_a_clip_s_memory_is_measured_in_processes_of_their_own(monkeypatch):
    (case, warm) = (case for _, case in find("memory", Settings(CPU), "mel_filterbank"))
    assert not list(find("memory", Settings(GPU), "mel_filterbank"))
    work = warm.build()
    assert all(each.step is None and each.peak_bytes for each in work.contenders)
    names = [each.name for each in work.contenders]
    assert names[:2] == ["fastast", "fastast, portable"]
    little, whole = mel_memory.steps("fastast")
    assert little().shape == (8, 128) and whole().shape == (998, 128)
    monkeypatch.setattr(peak, "PROCESSES", 1)
    # The frames are 0.5 MiB, of which the system may not count all.
    assert 0 < work.contenders[0].peak_bytes() < 2**22


def test_an_operation_s_memory_is_measured_in_processes_of_their_own(monkeypatch):
    found = [case for _, case in find("memory", Settings(CPU), "operations")]
    assert [f"ops/{case.name}" for case in found] == list(op_memory.CASES)
    assert not list(find("memory", Settings(GPU), "operations"))
    (case,) = (case for case in found if "length 16" in case.name)
    work = case.build()
    assert [each.name for each in work.contenders] == ["fastast", "padded SDPA", "masked rows"]
    assert all(each.step is None and each.peak_bytes for each in work.contenders)
    monkeypatch.setattr(peak, "PROCESSES", 1)
    # The output and three gradients of 4,096 rows of 192 numbers are 12 MiB.
    assert 2**23 < work.contenders[0].peak_bytes() < 2**26


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_contrasts_agree(backward):
    rows = measured(partial(info_nce._build, CPU, torch.float32, 2, backward))
    assert list(rows) == ["fastast", "gathered", "loop"]
    assert all(row["error"] < 1e-5 for row in rows.values())
    if backward:
        assert rows["fastast"]["saved_bytes"] < 2**14 < rows["gathered"]["saved_bytes"]


def test_the_filterbank_s_reference_takes_some_clips_at_a_time(monkeypatch):
    batch = mel_filterbank.Batch([(3000, 10), (399, 10), (5000, 23), (800, 15)])
    whole = mel_filterbank.build(CPU, batch, False).expected(torch.float64)["out"]
    monkeypatch.setattr(mel_filterbank, "REFERENCE_CLIPS", 3)
    parts = mel_filterbank.build(CPU, batch, False).expected(torch.float64)["out"]
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("most_scores", [1, 2 * 9 * 2, 1 << 20])
def test_the_reference_of_attention_is_the_library_s(most_scores):
    lengths = [5, 3, 3, 3, 17, 1]
    generator = torch.Generator().manual_seed(0)
    *qkv, grad = torch.randn(4, sum(lengths), 2, 8, generator=generator, dtype=torch.float64)
    inputs = dict(zip("qkv", qkv, strict=True))
    got = packed_attention.expected(inputs, grad, lengths, torch.float64, most_scores)
    leaves = [x.requires_grad_() for x in qkv]
    host = Segments.from_lengths(lengths).host_offsets
    out = packed_attention_reference(*leaves, host, 8**-0.5)
    want = dict(zip("qkv", torch.autograd.grad(out, leaves, grad), strict=True)) | {"out": out}
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12)


def test_a_document_mask_skips_the_blocks_between_documents():
    way = Document([128, 256, 100], CPU, 1024)
    # 1 + 4 + 1 blocks of 128 by 128; what fills the stream up sees nothing.
    assert way.pairs == 6 * 128**2
    stream = torch.arange(484.0).view(484, 1, 1)
    laid = way.layout(stream)
    assert laid.shape == (1, 1024, 1, 1)
    assert torch.equal(way.to_stream(laid), stream)


def test_block_masks_of_all_lengths_have_one_shape():
    shapes = set()
    for lengths in ([16] * 32, [300], [7, 80, 200, 50]):
        mask = Document(lengths, CPU, 512).mask
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_q_indices")
        shapes.add(tuple(getattr(mask, name).shape for name in names))
    assert len(shapes) == 1


def test_a_gpu_s_lists_of_lengths_hold_about_as_many_tokens():
    lists = dict(segment_lengths(GPU))
    assert list(lists) == [*map(str, GPU_LENGTHS), "mixed"]
    totals = [sum(lengths) for lengths in lists.values()]
    assert max(totals) <= GPU_TOKENS
    assert min(totals) > 0.96 * GPU_TOKENS
    mixed = lists["mixed"]
    assert 16 <= min(mixed) < 100 and 1100 < max(mixed) <= 1214


def test_a_gpu_is_asked_for_every_length_and_head_dim():
    cases = [case for _, case in find("ops", Settings(GPU), "packed_attention")]
    assert len(cases) == 11 * 4 * 2 == len({case.name for case in cases})
    assert {case.shapes["heads"] * case.shapes["head_dim"] for case in cases} == {768}
    filterbanks = [case for _, case in find("ops", Settings(GPU), "mel_filterbank")]
    assert {case.dtype for case in filterbanks} == {torch.float32, torch.bfloat16}
    assert filterbanks[0].shapes["samples"] == [160_000]
