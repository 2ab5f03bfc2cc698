"""Which kernels are in use."""

import pytest

from fastast.ops._library import UNTRIED, gpu_kernels


@pytest.mark.parametrize(
    "value, tried, untried", [(None, True, False), ("0", False, False), ("all", True, True)]
)
def test_kernels_that_have_not_run_on_a_gpu_are_asked_for(monkeypatch, value, tried, untried):
    monkeypatch.delenv("FASTAST_GPU_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTAST_GPU_KERNELS", value)
    assert gpu_kernels("packed_attention") == tried
    assert {gpu_kernels(operator) for operator in UNTRIED} == {untried}
