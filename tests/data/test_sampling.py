"""Which clips an epoch visits: their shares, their order, and which part of each."""

import numpy as np
import pytest
import torch

from fastast.data import AudioDataset, Crop, Manifest, Mixup, Sampler, write_wav
from fastast.data.sampling import OCCURRENCE, class_balanced_weights, cut

RATE = 8000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """60 clips of three classes, 40, 15 and 5 of each."""
    file = tmp_path_factory.mktemp("sampling") / "one.wav"
    write_wav(file, torch.arange(800, dtype=torch.int16), RATE)
    labels = [(0,)] * 40 + [(1,)] * 15 + [(2,)] * 5
    names = [f"clip {number}" for number in range(60)]
    return AudioDataset(Manifest([str(file)] * 60, labels, list("abc"), names=names), RATE)


def draw(dataset, epochs=1, seed=0, **settings):
    sampler = Sampler(**settings)
    return [sampler.draw(dataset, seed, epoch) for epoch in range(epochs)]


def test_each_clip_once_in_a_new_order(dataset):
    first, second = draw(dataset, 2)
    assert sorted(first.rows) == sorted(second.rows) == list(range(60))
    assert first.rows.tolist() != second.rows.tolist() != list(range(60))
    assert (first.keys == dataset.clip_ids[first.rows]).all()
    assert draw(dataset, shuffle=False)[0].rows.tolist() == list(range(60))


def test_part_of_the_clips(dataset):
    visits = draw(dataset, 60, clips=20)
    assert all(len(set(visit.rows)) == 20 for visit in visits)
    times = np.bincount(np.concatenate([visit.rows for visit in visits]), minlength=60)
    assert times.min() > 5 and times.max() < 40  # of 60 epochs, 20 on average


def test_weights_are_those_of_ast(dataset):
    expected = [1000 / 40.01] * 40 + [1000 / 15.01] * 15 + [1000 / 5.01] * 5
    np.testing.assert_allclose(class_balanced_weights(dataset), expected)


def test_weights_of_several_labels_add_up(dataset, tmp_path):
    file = str(dataset.paths[0])
    labels = [(0,), (0, 1), (1, 0), (0, 1)]
    manifest = Manifest([file] * 4, labels, ["a", "b"], multi_label=True, names=list("wxyz"))
    weights = class_balanced_weights(AudioDataset(manifest, RATE))
    a, b = 1000 / 4.01, 1000 / 3.01
    np.testing.assert_allclose(weights, [a, a + b, a + b, a + b])
    manifest = Manifest([file] * 2, [(0,), ()], ["a"], multi_label=True, names=list("wx"))
    with pytest.raises(ValueError, match="x has no label: balanced sampling"):
        class_balanced_weights(AudioDataset(manifest, RATE))


def test_balanced_with_replacement(dataset):
    (visits,) = draw(dataset, balance="with_replacement", clips=30_000)
    classes = np.bincount(dataset.labels[visits.rows]) / 30_000
    np.testing.assert_allclose(classes, 1 / 3, atol=0.01)  # 3.7 standard deviations
    within = np.bincount(visits.rows, minlength=60)[55:] / 10_000
    np.testing.assert_allclose(within, 1 / 5, atol=0.02)
    # Every visit has random numbers of its own, and the key tells which clip it is.
    assert len(set(visits.keys)) == 30_000
    assert (visits.keys % OCCURRENCE == dataset.clip_ids[visits.rows]).all()
    first = dict(zip(visits.rows[::-1], visits.keys[::-1], strict=True))
    assert all(key == dataset.clip_ids[row] for row, key in first.items())


def test_balanced_without_replacement(dataset):
    """As one after the other is drawn, the shares of the first draws are those of the weights."""
    epochs = 4000
    visits = draw(dataset, epochs, balance="without_replacement", clips=2)
    assert all(len(set(visit.rows)) == 2 for visit in visits)
    times = np.bincount(np.concatenate([visit.rows for visit in visits]), minlength=60) / epochs
    weights = class_balanced_weights(dataset)
    share = weights / weights.sum()
    expected = [
        own + sum(share[k] * own / (1 - share[k]) for k in range(60) if k != index)
        for index, own in enumerate(share)
    ]
    deviation = np.sqrt(np.array(expected) / epochs)
    assert (np.abs(times - expected) < 4.5 * deviation).all()


def test_balanced_draws_come_in_random_order(dataset):
    visits = draw(dataset, 200, balance="without_replacement", clips=40)
    half = [dataset.labels[visit.rows[:20]] == 2 for visit in visits]
    share = np.mean([visit.sum() for visit in half]) / np.mean(
        [(dataset.labels[visit.rows] == 2).sum() for visit in visits]
    )
    assert share == pytest.approx(0.5, abs=0.06)


def test_wrong_settings(dataset):
    with pytest.raises(ValueError, match="clips must be at least 1"):
        Sampler(clips=0)
    with pytest.raises(ValueError, match="balance must be one of"):
        Sampler(balance="always")
    with pytest.raises(ValueError, match="shuffle=False visits every clip once"):
        Sampler(shuffle=False, clips=3)
    for balance in ("none", "without_replacement"):
        with pytest.raises(ValueError, match="61 clips cannot be drawn from 60"):
            draw(dataset, balance=balance, clips=61)
    with pytest.raises(ValueError, match=r"seconds must be \(shortest, longest\)"):
        Crop((2.0, 1.0))
    with pytest.raises(ValueError, match="place must be"):
        Crop((1.0, 2.0), "middle")
    with pytest.raises(ValueError, match="probability must lie in"):
        Mixup(0.0)
    with pytest.raises(ValueError, match="alpha must be positive"):
        Mixup(0.5, -1.0)


@pytest.mark.parametrize("place", ["beginning", "random", "cyclic"])
def test_crops(place):
    crop = Crop((0.5, 1.0), place)
    lengths = np.repeat([3000, 6000, 20000], 4000)
    begin, taken = crop.draw(lengths, np.arange(12000), RATE, seed=1, epoch=2)
    limit = crop.longest(lengths, RATE)
    assert (taken <= limit).all()
    if place == "cyclic":
        assert (limit == 8000).all() and taken.min() >= 4000 and taken.max() < 8000
        assert (begin < lengths).all() and begin.min() < 5
        assert begin[8000:].mean() == pytest.approx(10000, rel=0.05)
    else:
        assert (begin + taken <= lengths).all()
        assert (taken[:4000] == 3000).all()  # shorter than the least that is drawn
        assert (begin == 0).all() == (place == "beginning")
    long = taken[8000:]
    assert long.mean() == pytest.approx(6000, rel=0.02)  # uniform in [4000, 8000)
    assert long.std() == pytest.approx(4000 / np.sqrt(12), rel=0.05)
    if place == "random":
        share = begin[8000:] / (20000 - long)
        assert share.mean() == pytest.approx(0.5, abs=0.03) and share.max() <= 1


def test_cut_goes_round():
    waveform = torch.arange(5, dtype=torch.int16)
    for begin in range(5):
        for samples in (1, 4, 5, 6, 13):
            expected = [(begin + place) % 5 for place in range(samples)]
            assert cut(waveform, begin, samples).tolist() == expected


def test_mixup_draws():
    partner, share = Mixup(0.3, alpha=10).draw(np.arange(20000), 50, seed=0, epoch=1)
    mixed = partner >= 0
    assert mixed.mean() == pytest.approx(0.3, abs=0.015)
    assert (share[~mixed] == 1).all() and share.dtype == np.float32
    assert np.bincount(partner[mixed], minlength=50).min() > 80  # of 120
    assert share[mixed].mean() == pytest.approx(0.5, abs=0.01)
    assert share[mixed].var() == pytest.approx(0.25 / 21, rel=0.1)  # of Beta(10, 10)
    again = Mixup(0.3, alpha=10).draw(np.array([7, 3]), 50, seed=0, epoch=1)
    assert again[0].tolist() == partner[[7, 3]].tolist()
