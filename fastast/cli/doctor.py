"""``fastast doctor``.

What other commands need is not imported here, so that it can be found missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

from fastast.cli import EXTRAS

_OPTIONAL = {"triton": "only GPUs need it", "pyarrow": "only embed --out x.parquet needs it"}


def main(argv: list[str]) -> int:
    """Prints a line per part of the installation; the status is 1 if one is to be mended."""
    if argv:
        raise ValueError(f"doctor takes no options, got {' '.join(argv)}")
    healthy = True

    def report(part: str, found: str, mend: str = "") -> None:
        nonlocal healthy
        healthy &= not mend
        print(f"{part:13} {found:40} {'-> ' + mend if mend else 'ok'}")

    report("Python", sys.version.split()[0])
    for module in ("torch", "numpy", *EXTRAS):
        package = {"yaml": "pyyaml"}.get(module, module)
        try:
            report(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            needed = "'fastast[train]'" if module in EXTRAS else package
            report(package, "missing", f"pip install {needed}")
    for package, why in _OPTIONAL.items():
        try:
            report(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            report(package, f"missing; {why}")
    if importlib.util.find_spec("fastast._packing"):
        report("native build", "fastast._packing")
    else:
        report("native build", "missing", "pip install -e . --no-build-isolation")

    import torch

    from fastast.ops import _native

    for device, state in _native.status().items():
        report("filterbank", f"{device} kernels {state}")
    report("CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            report("GPU", torch.cuda.get_device_name(index))
    else:
        report("GPU", "none; everything runs on the CPU")
    error = _self_test()
    report("attention", f"error {error:.0e} in float32", "" if error < 1e-5 else "wrong results")
    return 0 if healthy else 1


def _self_test() -> float:
    """Largest error of packed attention on a small ragged batch."""
    import torch

    from fastast import Segments
    from fastast.ops import packed_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    segments = Segments.from_lengths([7, 0, 64, 1])
    q, k, v = torch.randn(3, 72, 3, 64)
    exact = packed_attention(q.double(), k.double(), v.double(), segments, backend="reference")
    found = packed_attention(*(x.to(device) for x in (q, k, v)), segments.to(device))
    return (found.cpu() - exact).abs().max().item()
