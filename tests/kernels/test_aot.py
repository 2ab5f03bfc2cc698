"""Every shipped kernel compiles for the main architectures within its budget, without a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import triton
import triton.language as tl

from fastast.kernels import aot
from fastast.kernels.aot import ARCHITECTURES, AotCase, Resources

ROOT = Path(aot.__file__).resolve().parent.parent


@triton.jit
def product(a, b, out, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    left, right = tl.load(a + rows * N + columns), tl.load(b + rows * N + columns)
    tl.store(out + rows * N + columns, tl.dot(left, right).to(tl.bfloat16))


PRODUCT = AotCase(
    "product",
    product,
    dict.fromkeys(("a", "b", "out"), "*bf16:16"),
    {"N": 64},
    num_warps=4,
    num_stages=1,
    max_shared=32 * 1024,
    max_registers=128,
    expects_wgmma=True,
)


def test_shipped_kernels():
    """What CI checks of the library's own kernels; `make aot` checks the rest."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastast.kernels.aot", "--bf16", "--arch", "80", "90", "120"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    failed = [line for line in run.stdout.splitlines() if "FAILED" in line]
    assert run.returncode == 0, "\n".join(failed) or run.stderr
    assert "sm_90 pool_forward bf16 dim 768: registers" in run.stdout


def test_reads_the_compiled_code():
    hopper, ampere = aot.measure(PRODUCT, 90), aot.measure(PRODUCT, 80)
    assert hopper.wgmma and not ampere.wgmma
    # Both operands of 64 x 64 two-byte numbers pass through shared memory.
    assert hopper.shared == 2 * 64 * 64 * 2
    assert hopper.stack == ampere.stack == 0
    assert 16 < ampere.registers <= 255
    assert aot.violations(PRODUCT, 90, hopper) == []


def test_spilled_registers_are_seen():
    """128 x 128 sums in one warp are 512 per thread."""
    case = replace(PRODUCT, constexprs={"N": 128}, num_warps=1)
    found = aot.measure(case, 80)
    assert found.stack > 0
    assert any("spilled" in problem for problem in aot.violations(case, 80, found))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stack": 8}, "8 bytes of registers spilled"),
        ({"registers": 129}, "129 registers, budget 128"),
        ({"shared": 40000}, "40000 bytes shared, budget 32768"),
        ({"programs": 0}, "does not fit on a multiprocessor"),
        ({"wgmma": False}, "no wgmma"),
    ],
)
def test_each_promise_is_checked(change, message):
    found = Resources(128, 0, 32768, True, 2, 0.25)
    assert aot.violations(PRODUCT, 90, found) == []
    (problem,) = aot.violations(PRODUCT, 90, replace(found, **change))
    assert message in problem


@pytest.mark.parametrize(
    "arch, warps, registers, shared, programs",
    [
        (90, 8, 128, 0, 2),  # registers: 65,536 / (8 x 32 x 128)
        (90, 8, 129, 0, 1),  # rounded up to 136
        (90, 4, 32, 0, 16),  # registers again, and all 64 warps
        (80, 4, 32, 100 * 1024, 1),  # shared memory: 164 KiB
        (90, 4, 32, 113 * 1024, 2),  # 228 KiB, of which each program takes one more
        (90, 4, 32, 114 * 1024, 1),
        (86, 1, 16, 0, 16),  # programs
        (120, 4, 16, 0, 12),  # 48 warps
    ],
)
def test_programs_per_multiprocessor(arch, warps, registers, shared, programs):
    limits = ARCHITECTURES[arch]
    assert aot._programs_per_multiprocessor(limits, warps, registers, shared) == programs


def test_wrong_arguments_say_so():
    with pytest.raises(ValueError, match=r"product: .*differ in \['N', 'M'\]|\['M', 'N'\]"):
        aot.measure(replace(PRODUCT, constexprs={"M": 64}), 90)


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        aot.measure(PRODUCT, 90)


def test_table():
    """One section per architecture, one row per case that compiled."""
    resources = Resources(100, 0, 2048, False, 4, 0.25)
    reports = [
        aot.Report("a", 90, 8, resources, [], 1.0),
        aot.Report("b", 90, 4, None, ["fails"], 1.0),
        aot.Report("a", 80, 8, resources, [], 1.0),
    ]
    lines = aot.as_table(reports).splitlines()
    assert [line for line in lines if line.startswith("##")] == ["## sm_80", "## sm_90"]
    assert lines.count("| a | 8 | 100 | 2.0 | 4 | 25% |") == 2
    assert not any(line.startswith("| b") for line in lines)
