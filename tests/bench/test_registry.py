"""The list of benchmarks, and what a case may be asked for."""

import pytest
import torch

import bench.cases
from bench.registry import BENCHMARKS, GROUPS, Settings, benchmark, find

CPU = Settings(torch.device("cpu"))


def test_every_case_has_a_key_of_its_own():
    for group in GROUPS:
        found = [(b.name, case.name, case.dtype, case.size) for b, case in find(group, CPU)]
        assert found
        assert len(found) == len(set(found))


def test_the_three_groups_are_registered():
    assert bench.cases.TRUNK_SIZES.keys() == {"tiny", "small", "base"}
    assert set(BENCHMARKS) == {
        "ops/distillation",
        "ops/corruption",
        "ops/info_nce",
        "ops/masking",
        "ops/mel_filterbank",
        "ops/packed_attention",
        "ops/patchify",
        "ops/segment_pool",
        "ops/window_attention",
        "e2e/elastic_ast",
        "memory/elastic_ast",
        "memory/mel_filterbank",
        "memory/operations",
    }


def test_find_matches_any_part_of_benchmark_and_case():
    everything = list(find("ops", CPU))
    some = list(find("ops", CPU, "attention length 300*dim 24"))
    assert {case.name for _, case in some} == {
        "length 300, head dim 24, forward",
        "length 300, head dim 24, forward+backward",
    }
    assert 0 < len(list(find("ops", CPU, "mixed"))) < len(everything)
    assert not list(find("ops", CPU, "no such case"))


def test_settings_default_to_what_the_device_trains_in():
    assert (CPU.timed_dtype, CPU.timed_size) == (torch.float32, "tiny")
    gpu = Settings(torch.device("cuda"))
    assert (gpu.timed_dtype, gpu.timed_size) == (torch.bfloat16, "base")
    chosen = Settings(torch.device("cuda"), torch.float16, "small")
    assert (chosen.timed_dtype, chosen.timed_size) == (torch.float16, "small")


def test_memory_is_counted_at_full_size_in_both_dtypes_by_default():
    cases = [case for _, case in find("memory", CPU, "elastic_ast")]
    assert {(case.dtype, case.size) for case in cases} == {
        (torch.float32, "base"),
        (torch.bfloat16, "base"),
    }


@pytest.mark.parametrize("name", ["ops/packed_attention", "speed/of_light"])
def test_a_taken_name_or_an_unknown_group_is_refused(name):
    with pytest.raises(ValueError, match="registered already|must begin with"):
        benchmark(name, "")(lambda settings: [])
