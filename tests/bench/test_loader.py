"""The loader benchmark measures what it says."""

from bench import loader, report, results


def test_every_format_is_measured(tmp_path):
    loader.main(["--clips", "1", "--steps", "1", "--out", str(tmp_path)])
    rows = results.load(tmp_path / "cpu" / "loader.json")["rows"]
    assert [row["format"] for row in rows] == list(loader.FORMATS)
    assert all(row["clips"] == 8 and 0 <= row["wait"] < 1 for row in rows)
    wav, flac, stereo = (row["decode"] for row in rows)
    assert wav > flac > stereo
    # Of the other formats decoding is nearly all, and one measurement cannot tell the two apart.
    assert rows[0]["batches"] < rows[0]["decode"]
    page = report.render(tmp_path)
    assert "## Loading" in page and "FLAC, 44.1 kHz stereo" in page
    assert rows[0]["bytes_per_clip"] == 44 + 2 * 160_000
