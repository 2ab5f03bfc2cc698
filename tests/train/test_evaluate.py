"""Evaluation: every clip once, whatever the batches, the fillers and the ranks."""

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from rich.console import Console
from torch import nn

from fastast.data import LeftOut
from fastast.train import bar, build_method, evaluate, load_data, make_loader
from fastast.train.metrics import measure

module = sys.modules["fastast.train.evaluate"]  # the package's name for the function hides it

CLASSES = 5
LOGITS = torch.randn(23, CLASSES, generator=torch.Generator().manual_seed(0))
TARGETS = {
    "single": torch.randint(CLASSES, (23,), generator=torch.Generator().manual_seed(1)),
    "multi": (LOGITS.roll(1, 0) > 0).float(),
}


class Batch(SimpleNamespace):
    """Of the given clips in this order; -1 is a segment that is none."""

    def __init__(self, ids: list[int], targets: torch.Tensor, left_out=()) -> None:
        clip_ids = torch.tensor(ids)
        targets = targets[clip_ids].clone()
        targets[clip_ids < 0] = -100 if targets.ndim == 1 else 0
        real = int((clip_ids >= 0).sum())
        super().__init__(
            clip_ids=clip_ids,
            targets=targets,
            # Of a step of several batches, so not this batch's number of clips.
            loss_denominator=torch.tensor(7.0),
            num_clips=real,
            num_tokens=3 * real,
            left_out=left_out,
        )

    def to(self, device, non_blocking=False):
        return self


class Loader(SimpleNamespace):
    """Deals batches of chosen clips."""

    def __init__(self, batches: list[Batch], left_out=()) -> None:
        super().__init__(batches=batches, dataset=SimpleNamespace(left_out=list(left_out)))

    def epoch(self, epoch):
        assert epoch == 0
        return iter(self.batches)

    def num_batches(self, epoch):
        return len(self.batches)


class Method(nn.Module):
    """Looks the logits up; the loss of clip i is i, and of what is no clip poison."""

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        logits = torch.where(batch.clip_ids[:, None] >= 0, LOGITS[batch.clip_ids], torch.nan)
        total = batch.clip_ids.clamp(min=0).sum()
        return {"logits": logits, "loss": total / batch.loss_denominator}


PARTS = [[[4, 1, -1], [22, 0, 7]], [[9, 3, 2, -1]], []]
EVALUATED = sorted(clip for part in PARTS for batch in part for clip in batch if clip >= 0)


def loader_of(part: list[list[int]], kind: str) -> Loader:
    left_out = [LeftOut("missing.wav", "there is no such file")]
    batches = [Batch(ids, TARGETS[kind]) for ids in part]
    if batches:
        batches[0].left_out = (LeftOut(f"{part[0][0]}.wav", "is damaged"),)
    return Loader(batches, left_out)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_every_clip_counts_once(kind):
    method = Method().train()
    score = evaluate(method, loader_of([*PARTS[0], *PARTS[1], [-1]], kind), "cpu")
    assert method.training
    expected, per_class = measure(LOGITS[EVALUATED], TARGETS[kind][EVALUATED])
    assert score.metrics == expected and score.per_class == per_class
    assert score.accuracy == expected.get("accuracy")
    assert score.loss == pytest.approx(sum(EVALUATED) / len(EVALUATED))
    assert (score.clips, score.tokens) == (8, 24)
    assert [clip.path for clip in score.left_out] == ["missing.wav", "4.wav"]


def test_a_clip_that_is_dealt_twice_counts_once():
    score = evaluate(Method(), loader_of([*PARTS[0], *PARTS[1], [4, 22]], "single"), "cpu")
    assert score.clips == 8
    assert score.metrics == measure(LOGITS[EVALUATED], TARGETS["single"][EVALUATED])[0]


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(PARTS)
    )
    scores = {kind: evaluate(Method(), loader_of(PARTS[rank], kind), "cpu") for kind in TARGETS}
    torch.save(scores, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_agree_with_one_process(tmp_path):
    """Their parts are uneven, one has none, and a file is damaged on two of them."""
    mp.spawn(_rank, (str(tmp_path),), nprocs=len(PARTS))
    for rank in range(len(PARTS)):
        scores = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for kind, score in scores.items():
            alone = evaluate(Method(), loader_of([*PARTS[0], *PARTS[1]], kind), "cpu")
            assert score.metrics == alone.metrics and score.per_class == alone.per_class
            assert score.loss == pytest.approx(alone.loss)
            assert (score.clips, score.tokens) == (alone.clips, alone.tokens)
            assert [clip.path for clip in score.left_out] == ["missing.wav", "4.wav", "9.wav"]


class Beginning(nn.Module):
    """Says what a clip's first sample is."""

    def forward(self, batch):
        first = batch.waveforms[batch.sample_offsets[:-1]].double() / 1000
        return {"logits": torch.stack([first, -first], 1), "loss": first.mean()}


def test_clips_are_heard_from_several_beginnings(recipe, monkeypatch):
    recipe.frontend = replace(recipe.frontend, mean=0.0, std=1.0)
    data = load_data(recipe.data).test
    loader = make_loader(recipe, data, build_method(recipe, 2).model.geometry)
    found = []
    monkeypatch.setattr(module, "measure", lambda *args: found.append(args[0]) or measure(*args))
    score = evaluate(Beginning(), loader, "cpu", rolls=4)
    order = torch.from_numpy(data.clip_ids).argsort().tolist()
    heard = torch.stack([data.waveform(row)[[0, 100, 300, 600]] for row in order]) / 1000
    expected = torch.stack([heard, -heard], 2).softmax(2).mean(1)
    torch.testing.assert_close(found[0], expected)
    assert score.loss == pytest.approx(heard.double().mean().item())


@pytest.mark.parametrize("rolls, message", [(0, "rolls must be at least 1"), (2, "learn classes")])
def test_rolls_that_there_are_not(recipe, rolls, message):
    recipe.frontend = replace(recipe.frontend, mean=0.0, std=1.0)
    data = load_data(recipe.data).test
    loader = make_loader(recipe, data, build_method(recipe, 2).model.geometry)

    class Unlabelled(nn.Module):
        def forward(self, batch):
            return {"loss": torch.zeros(())}

    with pytest.raises(ValueError, match=message):
        evaluate(Unlabelled(), loader, "cpu", rolls=rolls)


def test_the_score_is_json_without_nan():
    targets = torch.zeros(23, CLASSES)

    class Diverged(Method):
        def forward(self, batch):
            return {name: value * torch.nan for name, value in super().forward(batch).items()}

    loader = Loader([Batch([0, 1], targets)])
    assert evaluate(Method(), loader, "cpu").to_dict() == {
        "mAP": None,
        "mAUC": None,
        "d_prime": None,
        "loss": 0.5,
        "clips": 2,
        "left_out": 0,
        "absent_classes": CLASSES,
        "tokens": 6,
    }
    diverged = evaluate(Diverged(), loader, "cpu")
    assert diverged.loss != diverged.loss
    assert json.loads(json.dumps(diverged.to_dict(), allow_nan=False))["loss"] is None


def test_a_bar_follows_on_a_terminal_if_it_has_a_title(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(bar, "CONSOLE", Console(file=shown, force_terminal=True, width=100))
    evaluate(Method(), loader_of(PARTS[0], "single"), "cpu")
    assert shown.getvalue() == ""
    evaluate(Method(), loader_of(PARTS[0], "single"), "cpu", title="Looking")
    assert "Looking" in shown.getvalue() and "2/2" in shown.getvalue()


def test_nothing_to_evaluate_says_so():
    with pytest.raises(ValueError, match="no clip to evaluate; 2 were left out"):
        evaluate(Method(), loader_of([[-1]], "single"), "cpu")
