"""What the CUDA kernels need of a multiprocessor, as ptxas tells it. As a program, writes csrc/cuda/RESOURCES.md."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch_mtl_pyg import _build

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TABLE = CSRC / "cuda" / "RESOURCES.md"
ARCHITECTURES = ("sm_80", "sm_90")
JOBS = 2
HOW = "python tests/cuda_resources.py"


@dataclass(frozen=True)
class Kernel:
    """A kernel compiled for one architecture. Sizes are in bytes."""

    file: str
    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int


def find_nvcc() -> _build.Compiler | None:
    program = _build._find_nvcc()
    return None if program is None else _build.Compiler((program,), "")


def nvcc_version(nvcc: _build.Compiler) -> str:
    shown = subprocess.run([*nvcc.command, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\S+)", shown)[1]


def compile_kernels(nvcc: _build.Compiler, files: Iterable[Path] | None = None) -> list[Kernel]:
    """Compiles the kernels, all of them unless files are given, for all architectures.

    Raises:
        RuntimeError: A file does not compile.
    """
    if files is None:
        files = (CSRC / "cuda").rglob("*.cu")
    largest_first = sorted(files, key=lambda file: -file.stat().st_size)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        jobs = [(nvcc, file, each, Path(folder)) for file in largest_first for each in ARCHITECTURES]
        found = [kernel for kernels in pool.map(lambda job: _compile(*job), jobs) for kernel in kernels]
    return sorted(found, key=lambda kernel: (kernel.file, kernel.name, kernel.architecture))


def _compile(nvcc: _build.Compiler, file: Path, architecture: str, folder: Path) -> list[Kernel]:
    torch = _build.torch_settings()
    include = [f"-I{CSRC}", *(word for path in torch.include for word in ("-isystem", str(path)))]
    flags = (*_build.COMMON_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}")
    command = _build.nvcc_command(nvcc, _build.find_compiler(), flags, include, [f"-arch={architecture}"])
    # The host's side is the same for all: once is enough.
    command += ["-c" if architecture == ARCHITECTURES[0] else "-cubin", "-Xptxas", "-v", str(file)]
    done = subprocess.run([*command, "-o", str(folder / f"{file.stem}.{architecture}")], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{file} does not compile for {architecture}:\n{done.stdout}{done.stderr}")
    return parse(done.stdout + done.stderr, file.name)


def parse(text: str, file: str) -> list[Kernel]:
    """Reads what ``ptxas -v`` prints."""
    pattern = (
        r"Compiling entry function '(\S+)' for '(\w+)'\s*\n"
        r"(?:.*\n)*?\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s*\n"
        r".*?Used (\d+) registers(.*)"
    )
    found = re.findall(pattern, text)
    if len(found) != text.count("Compiling entry function"):
        raise RuntimeError(f"{file}: expected the output of ptxas -v, got:\n{text}")
    names = demangle(symbol for symbol, *_ in found)
    kernels = []
    for name, (_, architecture, stack, stores, loads, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        sizes = int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads)
        kernels.append(Kernel(file, name, architecture, *sizes))
    return kernels


def demangle(symbols: Iterable[str]) -> list[str]:
    """Names without parameters and without the namespaces that all share."""
    words = list(symbols)
    shown = subprocess.run(["c++filt", "-p"], input="\n".join(words), capture_output=True, text=True, check=True).stdout
    names = [re.sub(r"mtl::cuda::|\(anonymous namespace\)::|^void ", "", line) for line in shown.splitlines()]
    if len(names) != len(words):
        raise RuntimeError(f"c++filt: expected {len(words)} names, got:\n{shown}")
    return names


def table(kernels: Iterable[Kernel], version: str) -> str:
    """The document."""
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.file, kernel.name), {})[kernel.architecture] = kernel
    first = ARCHITECTURES[0]
    lines = [
        "# Registers of the CUDA kernels",
        "",
        f"A thread's registers, and the bytes of static shared memory of a block, by nvcc {version}. No kernel spills",
        f"registers or has a stack frame. Written by `{HOW}`; `tests/test_cuda_compile.py` compares.",
        "",
        f"| file | kernel | {' | '.join(f'registers, {each}' for each in ARCHITECTURES)} | shared |",
        f"| --- | --- |{' --- |' * len(ARCHITECTURES)} --- |",
    ]
    for (file, name), each in sorted(rows.items()):
        registers = " | ".join(str(each[architecture].registers) for architecture in ARCHITECTURES)
        lines.append(f"| {file} | `{name}` | {registers} | {each[first].shared} |")
    return "\n".join(lines) + "\n"


def listed(text: str) -> tuple[str, set[tuple[str, str]]]:
    """The version of nvcc that the document names, and its kernels."""
    version = re.search(r"by nvcc (\S+)\. ", text)
    return version[1] if version else "none", set(re.findall(r"^\| (\S+) \| `(.+?)` \|", text, re.MULTILINE))


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("nvcc was not found in CUDA_HOME, CUDA_PATH or PATH.")
    TABLE.write_text(table(compile_kernels(nvcc), nvcc_version(nvcc)))


if __name__ == "__main__":
    main()
