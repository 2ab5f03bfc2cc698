"""What a frozen model's embeddings know: a linear classifier and nearest neighbours on them.

The usual ways of judging a representation without fine-tuning it. What either has to choose, the
penalty or the number of neighbours, is chosen on validation; the test clips are looked at once, for
what was chosen. Beside them stand the same two on the mean and deviation of the log-mel values over
time, which no model has made: an embedding is worth what it adds to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.data import AudioDataset, AudioError
from fastast.train.build import Splits, build_filterbank
from fastast.train.embed import embed
from fastast.train.metrics import headline, measure
from fastast.train.recipe import Recipe

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""On the squared weights of the linear classifier; features have deviation 1, losses are means."""
NEIGHBOURS = (1, 3, 5, 10, 20, 50)


class Labelled(NamedTuple):
    """Some clips.

    Attributes:
        features: float32 ``[clips, dim]``.
        targets: as :meth:`~fastast.data.AudioDataset.targets` gives them.
        classes: that there are.
    """

    features: Tensor
    targets: Tensor
    classes: int


def probe(
    method: nn.Module,
    recipe: Recipe,
    splits: Splits,
    device: torch.device | str,
    *,
    workers: int = 0,
    titled: bool = False,
) -> dict[str, dict]:
    """Scores of both probes, on the model's embeddings and on log-mel statistics.

    Args:
        method, recipe: from :func:`~fastast.train.load_model`; also of a model that was pre-trained
            without labels.
        splits: labelled clips. Without validation, a tenth of the training clips is cut off.
        device: of the method.
        workers: processes that decode; 0 leaves it to a thread.
        titled: show progress bars, where the output is a terminal.

    Returns:
        For ``"linear"``, ``"neighbours"``, ``"log-mel linear"`` and ``"log-mel neighbours"``: the
        metrics of the test clips (:mod:`fastast.train.metrics`), ``"chosen"``, the penalty or the
        number of neighbours, and ``"validation"``, the metric it was chosen by.

    Raises:
        ValueError: there are no labelled clips to train or to test on.
    """
    train, validation, test = splits.train, splits.validation, splits.test
    if train is None or test is None or not (len(train.class_names) and len(test.class_names)):
        raise ValueError("a probe needs labelled clips to train on and to test: set data.test")
    if validation is None:
        train, validation = train.split(0.1, recipe.data.split_seed)
    parts = (train, validation, test)
    titles = [f"Embedding {name}" if titled else None for name in ("train", "validation", "test")]
    embedded = [
        _embedded(method, recipe, clips, device, workers, title)
        for clips, title in zip(parts, titles, strict=True)
    ]
    statistics = [_log_mel(recipe, clips) for clips in parts]
    results = {}
    for prefix, features in (("", embedded), ("log-mel ", statistics)):
        features = _standardised(features)
        results[f"{prefix}linear"] = _best(features, PENALTIES, linear_scores)
        results[f"{prefix}neighbours"] = _best(features, NEIGHBOURS, neighbour_scores)
    return results


def linear_scores(train: Labelled, features: Tensor, penalty: float) -> Tensor:
    """Logits ``[clips, classes]`` of a linear classifier that was fitted to ``train``.

    Its loss, cross-entropy or binary cross-entropy over all clips at once, is convex, and L-BFGS
    finds its minimum from zero; there is nothing random in it.
    """
    known, targets = train.features.double(), train.targets
    weight = known.new_zeros(train.classes, known.shape[1], requires_grad=True)
    bias = known.new_zeros(train.classes, requires_grad=True)
    objective = F.cross_entropy
    if targets.ndim == 2:
        objective, targets = F.binary_cross_entropy_with_logits, targets.double()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(F.linear(known, weight, bias), targets)
        loss = loss + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(features.double(), weight, bias).detach().float()


def neighbour_scores(train: Labelled, features: Tensor, count: int) -> Tensor:
    """Of each class, how much of the ``count`` nearest training clips has it: ``[clips, classes]``.

    Near is a large cosine, and neighbours count by ``exp(cosine / 0.07)`` (the temperature of Wu et
    al., 2018, which self-supervised vision uses).
    """
    targets = train.targets
    if targets.ndim == 1:
        targets = F.one_hot(targets, train.classes).float()
    count = min(count, len(train.features))
    known = F.normalize(train.features)
    scores = []
    for chunk in F.normalize(features).split(1024):
        cosines, rows = (chunk @ known.T).topk(count)
        weights = (cosines / 0.07).softmax(1)
        scores.append((weights[:, :, None] * targets[rows]).sum(1))
    return torch.cat(scores)


def _best(
    parts: list[Labelled], choices: tuple, scores: Callable[[Labelled, Tensor, float], Tensor]
) -> dict:
    train, validation, test = parts

    def value(choice: float) -> float:
        metrics, _ = measure(scores(train, validation.features, choice), validation.targets)
        return metrics[headline(metrics)] or 0.0

    values = {choice: value(choice) for choice in choices}
    chosen = max(values, key=values.__getitem__)
    metrics, _ = measure(scores(train, test.features, chosen), test.targets)
    return metrics | {"chosen": chosen, "validation": values[chosen], "clips": len(test.targets)}


def _standardised(parts: list[Labelled]) -> list[Labelled]:
    """All by the mean and deviation of the first, whose constant columns become zero."""
    mean, deviation = parts[0].features.mean(0), parts[0].features.std(0)
    scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / deviation, 0.0)
    return [part._replace(features=(part.features - mean) * scale) for part in parts]


def _embedded(
    method: nn.Module,
    recipe: Recipe,
    clips: AudioDataset,
    device: torch.device | str,
    workers: int,
    title: str | None,
) -> Labelled:
    rows = {name: row for row, name in enumerate(clips.names)}
    chunks = list(embed(method, recipe, clips, device, workers=workers, title=title))
    order = [rows[name] for chunk in chunks for name in chunk.names]
    vectors = torch.cat([chunk.vectors for chunk in chunks])
    return Labelled(vectors, clips.targets(order), len(clips.class_names))


def _log_mel(recipe: Recipe, clips: AudioDataset) -> Labelled:
    """Mean and deviation over time of each mel bin."""
    filterbank = build_filterbank(recipe)
    vectors, rows = [], []
    for row in range(len(clips)):
        try:
            frames = filterbank([clips.waveform(row)]).frames
        except AudioError:  # which the embeddings lack as well
            continue
        if len(frames):
            vectors.append(torch.cat([frames.mean(0), frames.std(0, correction=0)]))
            rows.append(row)
    return Labelled(torch.stack(vectors), clips.targets(rows), len(clips.class_names))
