"""Finds and loads the compiled kernels that lie beside the package.

They register themselves under their device's key and so take precedence over the operators in
terms of PyTorch's own. Where they were not built, nothing changes but the speed;
:func:`status` says which ones are in use, and if not, why.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastast.ops._library import ANY_DEVICE, LIBRARY, gpu_kernels

FOLDER = Path(__file__).resolve().parents[1]
_FILES = {"cpu": "_mel_cpu.so", "cuda": "_mel_cuda.so"}
_status: dict[str, str] = {}


def load() -> None:
    """Loads what was built; a second call does nothing."""
    if _status:
        return
    from fastast.ops.mel_filterbank import portable_mel_filterbank

    # The kernels pass on to it, with the same arguments, what they have no code for.
    schema = str(torch.ops.fastast.mel_filterbank.default._schema)
    portable = "mel_filterbank_portable"
    LIBRARY.define(schema.replace("fastast::mel_filterbank", portable, 1))
    LIBRARY.impl(portable, portable_mel_filterbank, ANY_DEVICE)
    for device, file in _FILES.items():
        _status[device] = _load_file(device, FOLDER / file)


def _load_file(device: str, path: Path) -> str:
    if not path.exists():
        return f"not built: {path.name} is not in {path.parent}"
    if device == "cuda" and torch.version.cuda is None:
        return "not loaded: torch is built without CUDA"
    if device == "cuda" and not gpu_kernels():
        return "not loaded: FASTAST_GPU_KERNELS is 0"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # Most likely built with another version of torch or CUDA.
        return f"not loaded: {error}"
    return "loaded"


def status() -> dict[str, str]:
    """For each device "loaded", or the reason why its kernels are not in use."""
    load()
    return dict(_status)
