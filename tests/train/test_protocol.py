"""Evaluation over lengths, frame shifts and poolings (ElasticAST, 3.3 to 3.5), against doing it by
hand: clip by clip, with nothing but the filterbank and the model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastast import MelFilterbank
from fastast.train import build_method, evaluate_over, load_data
from fastast.train.build import seconds_of

MEAN, STD = -6.0, 4.0
LENGTHS = (16, 40, 400)  # frames; all clips are longer than the first, and shorter than the last


@pytest.fixture
def elastic(recipe):
    front = replace(recipe.frontend, mean=MEAN, std=STD)
    return replace(recipe, frontend=front, data=replace(recipe.data, test=0.2))


@pytest.fixture
def fixed(elastic):
    """An AST for clips of 40 frames."""
    front = replace(elastic.frontend, compression=[1.0], fixed_seconds=seconds_of(elastic, 40))
    model = replace(elastic.model, name="ast_tiny", stride=(16, 8), max_time_patches=None)
    return replace(elastic, frontend=front, model=model)


def made(recipe):
    torch.manual_seed(0)
    method = build_method(recipe, 2).eval()
    with torch.no_grad():  # so that clips differ in their logits
        for parameter in method.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method, load_data(recipe.data, ["test"]).test


@torch.inference_mode()
def by_hand(method, data, *, shift_ms=10.0, most=None, exactly=None, pool=1):
    """Accuracy and cross-entropy of clips of at most, or exactly, so many frames."""
    filterbank = MelFilterbank(8000, num_mels=32, frame_shift_ms=shift_ms)
    logits = []
    for index in range(len(data)):
        frames = filterbank([data.waveform(index)]).frames[: most or exactly]
        if exactly is not None:
            frames = F.pad(frames, (0, 0, 0, exactly - len(frames)))
        if pool > 1:
            frames = frames[: len(frames) // pool * pool].unflatten(0, (-1, pool)).mean(1)
        frames = (frames - MEAN) / (2 * STD)
        logits.append(method.model(frames[None]))
    logits, labels = torch.cat(logits), torch.from_numpy(data.labels)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": accuracy, "loss": F.cross_entropy(logits, labels).item()}


def check(row, expected):
    assert row["clips"] == 8 and row["left_out"] == 0
    assert row["accuracy"] == pytest.approx(expected["accuracy"])
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_elastic_ast_only_cuts(elastic):
    method, data = made(elastic)
    seconds = [seconds_of(elastic, frames) for frames in LENGTHS]
    rows = evaluate_over(method, elastic, data, lengths=seconds)["lengths"]
    assert [row["at"] for row in rows] == [0.175, 0.415, 4.015]
    for row, frames in zip(rows, LENGTHS, strict=True):
        check(row, by_hand(method, data, most=frames))
    whole = 1 + (data.lengths - 200) // 80
    for row, frames in zip(rows, LENGTHS, strict=True):  # not a token of padding
        assert row["tokens"] == 2 * (whole.clip(max=frames) // 8).sum()


def test_ast_cuts_and_pads(fixed):
    method, data = made(fixed)
    seconds = [seconds_of(fixed, frames) for frames in LENGTHS]
    rows = evaluate_over(method, fixed, data, lengths=seconds)["lengths"]
    for row, frames in zip(rows, LENGTHS, strict=True):
        check(row, by_hand(method, data, exactly=frames))
        assert row["tokens"] == len(data) * (2 + 2 * (frames // 8))


def test_frame_shifts(elastic, fixed):
    method, data = made(elastic)
    rows = evaluate_over(method, elastic, data, compression=[1.0, 1.4, 4.0])["compression"]
    assert [row["frame_shift_ms"] for row in rows] == [10.0, 14.0, 40.0]
    for row in rows[:2]:
        check(row, by_hand(method, data, shift_ms=row["frame_shift_ms"]))
    method, data = made(fixed)
    rows = evaluate_over(method, fixed, data, compression=[1.0, 2.0])["compression"]
    for row, frames in zip(rows, (40, 20), strict=True):  # of as much time
        check(row, by_hand(method, data, shift_ms=row["frame_shift_ms"], exactly=frames))


@pytest.mark.parametrize("trained", [None, 2, [1, 2]])
def test_poolings(elastic, trained):
    """Whatever was trained on, ``time_pools`` is how clips are pooled."""
    method, data = made(replace(elastic, model=replace(elastic.model, time_pool=trained)))
    elastic.model = replace(elastic.model, time_pool=trained)
    pooled = evaluate_over(method, elastic, data, time_pools=[1, 2], lengths=[0.9])
    rows = pooled["time_pools"] + pooled["lengths"]
    method.model.geometry = replace(method.model.geometry, time_pool=1)  # frames come pooled
    for row, pool in zip(rows, (1, 2, 2 if trained == 2 else 1), strict=True):
        check(row, by_hand(method, data, pool=pool))
