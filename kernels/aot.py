"""Compiles every kernel for every architecture without a GPU, and checks what it needs there.

Each kernel module lists the configurations it ships as :class:`AotCase` through
``aot_cases(arch)``. Here they are compiled down to machine code, and registers, stack and shared
memory are read from that with the ``cuobjdump`` that Triton brings. A case fails if it exceeds its
own budget, spills registers to the stack, does not fit the architecture at all, or misses the
Hopper matrix instructions (``wgmma``) that it was written for. The machine code is kept in
Triton's cache, whose key is a hash of the source, so that only changed kernels are compiled again.

    python -m fastast.kernels.aot                     all kernels, all architectures
    python -m fastast.kernels.aot --arch 90 --only pool
    python -m fastast.kernels.aot --table docs/kernels.md
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class AotCase:
    """One shipped configuration of a kernel, and what it may use.

    Attributes:
        name: unique among the cases of an architecture, such as ``pool_forward bf16 dim 768``.
        fn: the kernel.
        signature: types of the arguments that are not compile-time constants, as ``"*bf16"`` or
            ``"i32"``. A suffix ``":16"`` promises a multiple of 16, as the launcher finds it out
            for aligned pointers and even strides.
        constexprs: values of the others.
        num_warps, num_stages: of the launch.
        max_shared: bytes of shared memory per program.
        max_registers: per thread.
        expects_wgmma: on sm_90, whether the matrix products must be Hopper's own instructions.
        maxnreg: registers per thread that the launch limits the assembler to.
    """

    name: str
    fn: JITFunction
    signature: dict[str, str]
    constexprs: dict
    num_warps: int
    num_stages: int
    max_shared: int
    max_registers: int
    expects_wgmma: bool
    maxnreg: int | None = None

    @property
    def is_bf16(self) -> bool:
        """Whether some argument points to bfloat16: what is checked at every commit."""
        return any(kind.startswith("*bf16") for kind in self.signature.values())


@dataclass(frozen=True)
class Architecture:
    """Limits of one streaming multiprocessor (CUDA C++ programming guide, technical
    specifications per compute capability). Registers are 65,536 everywhere."""

    warps: int
    programs: int
    shared: int
    shared_per_program: int


KIB = 1024
ARCHITECTURES = {
    80: Architecture(64, 32, 164 * KIB, 163 * KIB),  # A100
    86: Architecture(48, 16, 100 * KIB, 99 * KIB),  # A10, RTX 3090
    89: Architecture(48, 24, 100 * KIB, 99 * KIB),  # L40S, RTX 4090
    90: Architecture(64, 32, 228 * KIB, 227 * KIB),  # H100, H200
    100: Architecture(64, 32, 228 * KIB, 227 * KIB),  # B200
    120: Architecture(48, 24, 100 * KIB, 99 * KIB),  # RTX 5090, RTX PRO 6000
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers and bytes of stack per thread, bytes of shared
    memory per program, programs that fit on a multiprocessor, share of its warps they occupy."""

    registers: int
    stack: int
    shared: int
    wgmma: bool
    programs: int
    occupancy: float


def find_cases(arch: int) -> Iterator[AotCase]:
    """The cases of all modules of ``fastast.kernels`` that have any."""
    package = importlib.import_module("fastast.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        cases = getattr(
            importlib.import_module(f"fastast.kernels.{module.name}"), "aot_cases", None
        )
        if cases is not None:
            yield from cases(arch)


def measure(case: AotCase, arch: int) -> Resources:
    """Compiles a case for an architecture and reads its resources from the machine code.

    Raises:
        RuntimeError: Triton's interpreter is on, which leaves nothing to compile.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    names = case.fn.arg_names
    kinds = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    if set(kinds) != set(names):
        raise ValueError(
            f"{case.name}: signature and constexprs must name the kernel's arguments, "
            f"but differ in {sorted(set(kinds) ^ set(names))}"
        )
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if ":16" in kinds[n]}
    signature = {name: kinds[name].removesuffix(":16") for name in names}
    compiled = compile_kernel(
        ASTSource(case.fn, signature, case.constexprs, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "maxnreg": case.maxnreg,
        },
    )
    registers, stack = _read_usage(compiled.asm["cubin"])
    # Those of the launch, and more with warp specialisation.
    warps = int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])[1]) // 32
    shared = compiled.metadata.shared
    programs = _programs_per_multiprocessor(ARCHITECTURES[arch], warps, registers, shared)
    return Resources(
        registers,
        stack,
        shared,
        "wgmma" in compiled.asm["ptx"],
        programs,
        programs * warps / ARCHITECTURES[arch].warps,
    )


def violations(case: AotCase, arch: int, found: Resources) -> list[str]:
    """What a case breaks of its promises on an architecture; nothing if all is well."""
    limit = ARCHITECTURES[arch].shared_per_program
    problems = []
    if found.stack:
        problems.append(f"{found.stack} bytes of registers spilled to the stack")
    if found.registers > case.max_registers:
        problems.append(f"{found.registers} registers, budget {case.max_registers}")
    if found.shared > min(case.max_shared, limit):
        problems.append(
            f"{found.shared} bytes shared, budget {case.max_shared}, architecture {limit}"
        )
    if found.programs == 0:
        problems.append("does not fit on a multiprocessor")
    if arch == 90 and case.expects_wgmma and not found.wgmma:
        problems.append("no wgmma instructions")
    return problems


def _read_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if len(usage) != 1:
        raise RuntimeError(f"cuobjdump must report one kernel, got: {text}")
    return int(usage[0][0]), int(usage[0][1])


def _programs_per_multiprocessor(
    arch: Architecture, warps: int, registers: int, shared: int
) -> int:
    """Registers are given out per warp in steps of 256; each program pays 1 KiB of shared memory
    to the system."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // per_warp // warps if per_warp else arch.programs
    by_shared = arch.shared // (-(-shared // 128) * 128 + KIB)
    return min(arch.programs, arch.warps // warps, by_registers, by_shared)


# Command line ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """The outcome of one case on one architecture."""

    name: str
    arch: int
    warps: int
    resources: Resources | None
    problems: list[str]
    seconds: float


def _report(name: str, arch: int) -> Report:
    begin = time.perf_counter()
    (case,) = (case for case in find_cases(arch) if case.name == name)
    try:
        found = measure(case, arch)
        problems = violations(case, arch, found)
    except Exception as error:
        # A failure of the compiler is a finding about this case, not an end to the others.
        found, problems = None, [f"{type(error).__name__}: {str(error).strip()[:300]}"]
    return Report(name, arch, case.num_warps, found, problems, time.perf_counter() - begin)


def run(architectures: list[int], only: str = "", bf16: bool = False) -> Iterator[Report]:
    """Compiles the cases whose name contains ``only``, on all processors, in order."""
    work = []
    for arch in architectures:
        names = [c.name for c in find_cases(arch) if only in c.name and (c.is_bf16 or not bf16)]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(f"names of cases must be unique, repeated: {sorted(repeated)}")
        work += [(name, arch) for name in names]
    # Processes, because most of a compilation holds the interpreter's lock.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_report, *zip(*work, strict=True))


def as_table(reports: list[Report]) -> str:
    """The resources as a Markdown page."""
    lines = [
        "# Kernels",
        "",
        "What every shipped configuration takes on each architecture, read from the compiled code.",
        "Written by `make aot`; no GPU is needed. Registers are per thread, shared memory per",
        "program; occupancy is the share of a multiprocessor's warps that these allow.",
    ]
    for arch in sorted({report.arch for report in reports}):
        lines += [
            "",
            f"## sm_{arch}",
            "",
            "| kernel | warps | registers | shared, KiB | programs per SM | occupancy |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for report in reports:
            found = report.resources
            if report.arch == arch and found is not None:
                lines.append(
                    f"| {report.name} | {report.warps} | {found.registers} "
                    f"| {found.shared / KIB:.1f} | {found.programs} | {found.occupancy:.0%} |"
                )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if some case breaks a promise. The table is written if none does."""
    parser = argparse.ArgumentParser(prog="python -m fastast.kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, metavar="90")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--bf16", action="store_true", help="cases with bfloat16 tensors only")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the Markdown page")
    options = parser.parse_args(arguments)
    begin, reports = time.perf_counter(), []
    for report in run(options.arch or list(ARCHITECTURES), options.only, options.bf16):
        reports.append(report)
        usage = asdict(report.resources) if report.resources else {}
        usage = ", ".join(
            f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in usage.items()
        )
        verdict = "FAILED: " + "; ".join(report.problems) if report.problems else "ok"
        line = f"sm_{report.arch} {report.name}: {usage} [{report.seconds:.1f} s] {verdict}"
        print(line, flush=True)
    failed = [report for report in reports if report.problems]
    seconds = time.perf_counter() - begin
    print(f"{len(reports)} cases, {len(failed)} failed, {seconds:.0f} s")
    if options.table and not failed:
        options.table.write_text(as_table(reports))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
