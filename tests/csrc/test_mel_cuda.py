"""The CUDA kernel compiles for every architecture that we build for, without spilling registers.

Needs nvcc, but no GPU. What the kernel computes is tested in ``test_mel_kernels.py``.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "mel" / "cuda" / "kernel.cu"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
WHEELS = sorted((Path(torch.__file__).parents[1] / "nvidia").glob("cu[0-9]*"))

KERNELS = {
    **{("mel_kernel", points): 64 for points in (0, 512, 1024)},
    ("mel_kernel", 2048): 80,
    **{("warp_kernel", points): 128 for points in (256, 512)},
    ("warp_kernel", 1024): 255,
}
"""Registers with which four blocks of 256 threads share an SM, or three; four of 128, or two."""

STATIC_SHARED = 48 * 1024
"""Bytes that a block may have without asking."""


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in (*homes, *WHEELS) if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """ptxas's report for each architecture."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc in PATH or CUDA_HOME; pip install nvidia-cuda-nvcc brings it")
    folder = tmp_path_factory.mktemp("cubin")

    def compile_for(arch):
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin"]
        command += ["-o", folder / f"{arch}.cubin", SOURCE]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(ARCHITECTURES, pool.map(compile_for, ARCHITECTURES), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(reports, arch):
    done = reports[arch]
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    assert "warning" not in report
    names = re.findall(r"Compiling entry function '\S*?(mel_kernel|warp_kernel)ILi(\d+)E", report)
    kernels = [(name, int(points)) for name, points in names]
    assert sorted(kernels) == sorted(KERNELS)
    spills = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert re.findall(spills, report) == [("0", "0", "0")] * len(KERNELS)
    used = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    for kernel, registers in zip(kernels, used, strict=True):
        assert registers <= KERNELS[kernel], kernel
    # Blocks ask for theirs at launch: test_blocks_fit_into_shared_memory.
    shared = [int(size) for size in re.findall(r"(\d+) bytes smem", report)]
    assert len(shared) == 3 and max(shared) <= STATIC_SHARED
