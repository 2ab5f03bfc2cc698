"""The launches that are timed, and whether those in use are the ones that the times speak for."""

import json
from dataclasses import asdict, fields
from statistics import geometric_mean

import pytest

from bench.launches import CANDIDATES, candidates
from bench.results import RESULTS
from fastast.kernels.packed_attention.configs import HOPPER, Config, config_for

H200 = RESULTS / "nvidia-h200" / "launches.json"


def test_each_candidate_changes_one_launch():
    config = HOPPER[64]
    seen = set()
    for part, launch, changed in candidates(config, 100):
        assert launch in CANDIDATES[part]
        assert getattr(changed, part) in (launch, (launch,))
        seen.add(part)
        for field in fields(Config):
            if field.name == part or (
                field.name.startswith("whole") and not part.startswith("whole")
            ):
                continue
            assert getattr(changed, field.name) == getattr(config, field.name)
    assert seen == {field.name for field in fields(Config)}


def test_whole_kernels_are_candidates_only_where_a_segment_fits():
    parts = [part for part, _, _ in candidates(HOPPER[64], 129)]
    assert parts and not any(part.startswith("whole") for part in parts)


@pytest.mark.parametrize("head_dim", [24, 32, 64])
@pytest.mark.parametrize("part", ["forward", "backward_queries", "backward_keys"])
def test_the_launch_in_use_is_nearly_the_fastest(head_dim, part):
    """Over all lengths that were measured, no other launch is more than 3 % faster."""
    times: dict[str, dict[str, float]] = {}
    for row in json.loads(H200.read_text())["rows"]:
        if (row["kernel"], row["head_dim"]) == (part, head_dim) and row["median_ms"]:
            times.setdefault(json.dumps(row["launch"]), {})[row["length"]] = row["median_ms"]
    used = getattr(config_for(90, max(32, head_dim), 2), part)
    used_times = times[json.dumps(asdict(used))]
    assert len(used_times) >= 8
    for other in times.values():
        both = used_times.keys() & other.keys()
        assert geometric_mean(used_times[n] / other[n] for n in both) < 1.03
