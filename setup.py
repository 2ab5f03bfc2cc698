"""Runs CMake. The metadata is in pyproject.toml, the native build is in CMakeLists.txt.

The variable ``FASTAST_CUDA_ARCHS``, such as ``90`` or ``"80;90"``, names the GPU architectures to
compile for; without it, all that are supported.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str | None:
    """Path of a program, looked for beside the interpreter first: a virtual environment that is
    used without being activated is not on PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


class NativeDistribution(Distribution):
    """Has native code although setuptools builds none of it: the wheel belongs to one platform."""

    def has_ext_modules(self) -> bool:
        return True


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package: in place, or in setuptools' build tree."""

    def run(self) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        if cmake is None:
            sys.exit(f"cmake not found: {sys.executable} -m pip install cmake ninja")
        generator = "Ninja" if ninja else "Unix Makefiles"
        # One tree per interpreter and generator, so that building again is instant.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{generator.replace(' ', '-')}"
        configure = [cmake, "-S", ROOT, "-B", build, "-G", generator]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        if ninja:
            # Given anew each time: pip's isolated builds leave behind a path that is gone.
            configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # Given or taken back each time too: CMake would remember the last one's choice.
        archs = os.environ.get("FASTAST_CUDA_ARCHS")
        configure += [f"-DFASTAST_CUDA_ARCHS={archs}" if archs else "-UFASTAST_CUDA_ARCHS"]
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "fastast"

        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", build], check=True)
        subprocess.run([cmake, "--install", build, "--prefix", package], check=True)

    def get_source_files(self) -> list[str]:
        """What a source distribution needs beside the Python files."""
        sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
        return [str(p.relative_to(ROOT)) for p in [ROOT / "CMakeLists.txt", *sources]]


setup(distclass=NativeDistribution, cmdclass={"build_ext": CMakeBuild})
