"""The benchmark of the packers."""

import json

import numpy as np
import pytest

from bench import packing, report
from bench.batches import mixed_resolution_frames
from fastast.data.packing import STRATEGIES


def test_lengths_are_like_voxcelebs():
    tokens = packing.voxceleb_like(100_000)
    seconds = (tokens // 8 * 16 + 2) / 100  # of whole patches: up to 16 frames less than the clip
    assert 398 // 16 * 8 <= tokens.min() < 210  # 4 s, and the least excess that was drawn
    assert tokens.max() == 2998 // 16 * 8
    assert seconds.mean() + 0.08 == pytest.approx(8.1, abs=0.1)  # 8.2 s less what is cut
    padded = np.minimum(tokens, 512).mean() / 512
    assert 1 - padded == pytest.approx(0.311, abs=0.02)  # ElasticAST, of 1024 frames


def test_mixed_resolutions_are_those_of_the_batches():
    assert set(packing.mixed_resolution(2000)) == {f // 2 for f in mixed_resolution_frames(2000)}


def test_imbalance_is_the_mean_over_steps_but_the_last():
    amounts = np.array([3.0, 1.0, 5.0, 5.0, 9.0, 0.0])
    assert packing.imbalance(amounts, 2) == pytest.approx((0.5 + 0.0) / 2)
    assert packing.imbalance(amounts[:2], 2) == 0.0


def test_a_row_by_hand():
    # 6 clips of 8192 fill a batch of 24,576 three at a time: 2 full bins, and 2 empty on 4 ranks.
    row = packing.measure(np.full(6, 8192), "next_fit", None, 1, 1)
    assert (row["bins"], row["padding"], row["most_clips"]) == (2, 0.0, 3)
    row = packing.measure(np.full(6, 8192), "best_fit_decreasing", 64, 4, 1)
    assert (row["bins"], row["padding"], row["least_padding"]) == (4, 0.5, 0.5)
    assert row["most_clips"] == 2
    limited = packing.measure(np.full(6, 8192), "first_fit", 64, 1, 1, max_clips=2)
    assert (limited["bins"], limited["most_clips"], limited["max_clips"]) == (3, 2, 2)
    assert row["ns_per_clip"] * 6 == pytest.approx(row["us_per_bin"] * 4e3)


def test_long_clips_are_more_work_for_as_many_tokens():
    # Each step gives one rank 3 clips of 8192 tokens and the other 24 of 1024.
    lengths = np.array([8192] * 3 + [1024] * 24).tolist() * 3
    row = packing.measure(np.array(lengths), "next_fit", None, 2, 1)
    assert row["token_imbalance"] == 0.0
    long, short = (1 + length / (6 * packing.DIM) for length in (8192, 1024))
    assert row["work_imbalance"] == pytest.approx(2 * long / (long + short) - 1)


def test_the_command_writes_what_the_page_shows(tmp_path, capsys):
    packing.main(["--clips", "3000", "--many", "3000", "--reps", "1", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "cpu" / "packing.json").read_text())
    rows = document["rows"]
    assert {row["strategy"] for row in rows} == set(STRATEGIES)
    assert {row["ranks"] for row in rows} == {1, 8, packing.MANY_RANKS}
    assert document["run"]["machine"]["threads"] == 1
    table = report.packing_table(rows)
    assert len(table) == len(rows) + 2
    printed, page = capsys.readouterr().out, report.render(tmp_path)
    assert "## Packing" in page
    for line in table:
        assert line in printed
        assert line in page
    assert "None" not in page
