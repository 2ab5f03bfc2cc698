"""Metrics against scikit-learn and SciPy, and where they are undefined."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from fastast.train.metrics import d_prime, measure


def multi_hot(clips: int, classes: int) -> torch.Tensor:
    """Random labels; the first class has no clip, the second has all of them."""
    targets = torch.randint(2, (clips, classes), generator=torch.Generator().manual_seed(1))
    targets[:, 0], targets[:, 1] = 0, 1
    targets[0, 2:], targets[1, 2:] = 0, 1
    return targets.float()


def random_logits(clips: int, classes: int, *, ties: bool) -> torch.Tensor:
    logits = torch.randn(clips, classes, generator=torch.Generator().manual_seed(0))
    return logits.round() if ties else logits


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_multi_label_equals_sklearn(ties, offset):
    """Also where a float32 sigmoid is 1 for every logit."""
    targets = multi_hot(123, 7)
    logits = random_logits(123, 7, ties=ties) + offset
    metrics, per_class = measure(logits, targets)

    truth, scores = targets.numpy(), logits.double().numpy()
    ap = average_precision_score(truth[:, 1:], scores[:, 1:], average=None)
    auc = roc_auc_score(truth[:, 2:], scores[:, 2:], average=None)
    assert [score.positives for score in per_class] == truth.sum(0).tolist()
    assert per_class[0].ap is None
    assert [score.ap for score in per_class[1:]] == pytest.approx(ap, abs=1e-6)
    assert [score.auc for score in per_class[:2]] == [None, None]
    assert [score.auc for score in per_class[2:]] == pytest.approx(auc, abs=1e-6)
    assert all(score.recall is None for score in per_class)
    assert metrics == pytest.approx(
        {
            "mAP": ap.mean(),
            "mAUC": auc.mean(),
            "d_prime": np.sqrt(2) * norm.ppf(auc.mean()),
        },
        abs=1e-5,
    )


def test_single_label_equals_sklearn():
    logits = random_logits(200, 6, ties=False)
    targets = torch.randint(5, (200,), generator=torch.Generator().manual_seed(2))  # not the last
    metrics, per_class = measure(logits, targets)

    one_hot, guess = np.eye(6)[targets], logits.argmax(1)
    recall = recall_score(targets, guess, labels=range(5), average=None)
    assert metrics["accuracy"] == (guess == targets).sum().item() / 200
    assert [score.recall for score in per_class[:5]] == pytest.approx(recall)
    assert metrics["mAP"] == pytest.approx(
        average_precision_score(one_hot[:, :5], logits[:, :5]), abs=1e-6
    )
    assert metrics["mAUC"] == pytest.approx(roc_auc_score(one_hot[:, :5], logits[:, :5]), abs=1e-6)
    assert (per_class[5].positives, per_class[5].ap, per_class[5].recall) == (0, None, None)


def test_one_clip():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics, per_class = measure(torch.tensor([[0.1, 3.0]]), torch.tensor([1]))
    assert metrics == {"accuracy": 1.0, "mAP": 1.0, "mAUC": None, "d_prime": None}
    assert [score.ap for score in per_class] == [None, 1.0]


def test_no_label_anywhere():
    metrics, _ = measure(torch.randn(3, 2), torch.zeros(3, 2))
    assert metrics == {"mAP": None, "mAUC": None, "d_prime": None}


def test_infinite_d_prime_is_none():
    logits, targets = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    metrics, _ = measure(logits, targets)
    assert metrics == {"accuracy": 1.0, "mAP": 1.0, "mAUC": 1.0, "d_prime": None}
    assert d_prime(0.0) is None
    assert d_prime(0.5) == 0.0


@pytest.mark.parametrize("targets", [torch.tensor([0, 1]), torch.eye(2)], ids=["single", "multi"])
def test_nan_logits_have_no_score(targets):
    metrics, per_class = measure(torch.tensor([[0.0, torch.nan], [1.0, 2.0]]), targets)
    assert ("accuracy" in metrics) == (targets.ndim == 1)
    assert set(metrics.values()) == {None}
    assert [(score.positives, score.ap, score.auc) for score in per_class] == [(1, None, None)] * 2


@pytest.mark.parametrize(
    "logits, targets, message",
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), r"at least one each, got \(0, 3\)"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), r"got \(3,\) for logits"),
        (torch.zeros(2, 3), torch.tensor([0, -100]), r"in \[0, 3\) \(unlabelled.*got -100"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"in \[0, 3\).*got 3"),
        (torch.zeros(1, 2), torch.tensor([[0.0, 0.25]]), r"0 or 1 \(mixed.*got 0\.25"),
    ],
)
def test_wrong_input_says_so(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        measure(logits, targets)
