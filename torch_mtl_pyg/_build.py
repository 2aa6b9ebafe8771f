"""Compiles csrc/ into one shared library with ninja.

Used by ``setup.py`` (ahead of time) and by ``_extension.py`` (at first use). Imports neither torch nor the package
when it is imported, so that ``setup.py`` can load this file by its path in an environment without torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Every csrc/**/*.cpp outside csrc/cuda/ is compiled; `find_cuda` decides on csrc/cuda/**/*.cu. A file named *_<isa>.cpp
# gets the flags of that instruction set; on a CPU other than x86-64 only the files of the first row and those without a
# suffix are compiled. Instruction sets are in rising order, which is also the link order (see `sources`).
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "avx512_bf16": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        "-mavx512bf16",
    ),
}
# What the system calls what an instruction set needs.
ISA_FEATURES: dict[str, frozenset[str]] = {
    isa: frozenset(flag.removeprefix("-m").replace("512bf16", "512_bf16") for flag in flags)
    for isa, flags in ISA_FLAGS.items()
}
COMMON_FLAGS: tuple[str, ...] = (
    "-O2",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DNDEBUG",
)
# No rpath: torch's libraries are already in the process when this one is loaded.
LINK_FLAGS: dict[str, tuple[str, ...]] = {
    "linux": ("-shared", "-Wl,--as-needed", "-Wl,-z,defs"),
    "darwin": ("-dynamiclib", "-undefined", "dynamic_lookup"),
}
LINK_LIBRARIES: tuple[str, ...] = ("-ltorch", "-ltorch_cpu", "-lc10")
NVCC_FLAGS: tuple[str, ...] = ("-O3", "-std=c++17", "--expt-relaxed-constexpr")
# Machine code for Ampere and Hopper, and PTX that the driver of any later GPU compiles.
NVCC_TARGETS: tuple[str, ...] = (
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90,code=sm_90"),
    *("-gencode", "arch=compute_90,code=compute_90"),
)
# nvcc itself reads these, so that a host compiler newer than it knows can be allowed, for instance.
NVCC_VARIABLES: tuple[str, ...] = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
# What the emulator needs: the C++ compiler takes .cu files for C++, and blocks run on threads.
CUDA_EMULATION_FLAGS: tuple[str, ...] = ("-x", "c++", "-DMTL_EMULATE_CUDA", "-pthread")
# The runtime is part of the library, which therefore loads where there is no CUDA. libtorch, which names libtorch_cuda
# where there is one, is kept though nothing needs it: the search for the function that gives the stream starts there.
CUDA_LINK_LIBRARIES: tuple[str, ...] = (
    *("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"),
    *("-lcudart_static", "-ldl", "-lpthread", "-lrt"),
)
SOURCE_SUFFIXES: tuple[str, ...] = (".cpp", ".h", ".cu", ".cuh")

_EMULATED_ISAS = ("avx512", "avx512_bf16")


class BuildError(RuntimeError):
    """The library could not be compiled.

    Attributes:
        output: What the compiler or ninja printed; empty if neither was started.
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: ``command`` starts it, ``identity`` tells it apart from others without starting it."""

    command: tuple[str, ...]
    identity: str


@dataclass(frozen=True)
class Torch:
    """What the build needs to know of torch."""

    version: str
    cxx11_abi: bool
    include: tuple[Path, ...]
    lib: Path
    cuda: str | None = None  # the version of CUDA it was built for


@dataclass(frozen=True)
class Source:
    """One file to compile; ``isa`` is None for a file without an instruction set in its name."""

    path: Path
    isa: str | None

    @property
    def cuda(self) -> bool:
        """Whether it holds CUDA kernels."""
        return self.path.suffix == ".cu"


@dataclass(frozen=True)
class Cuda:
    """What compiles the CUDA kernels: ``nvcc``, the C++ compiler (emulated), or nothing; ``reason`` may say why not."""

    nvcc: Compiler | None = None
    emulated: bool = False
    reason: str = ""


def torch_settings() -> Torch:
    """Describes the installed torch.

    ``torch.utils.cpp_extension`` knows the same paths, but takes long to import.
    """
    import torch

    root = Path(torch.__path__[0])
    include = (root / "include", root / "include" / "torch" / "csrc" / "api" / "include")
    return Torch(torch.__version__, torch.compiled_with_cxx11_abi(), include, root / "lib", torch.version.cuda)


def emulation() -> str:
    """``TORCH_MTL_PYG_EMULATE``, for tests: 0, 1 (AVX-512, on AVX2) or cuda (a GPU: its kernels serve CPU tensors)."""
    value = os.environ.get("TORCH_MTL_PYG_EMULATE", "") or "0"
    if value not in ("0", "1", "cuda"):
        raise BuildError(f"TORCH_MTL_PYG_EMULATE: expected 0, 1 or cuda, got {value!r}.")
    return value


def emulated() -> bool:
    """Whether the wide kernels are compiled for AVX2."""
    return emulation() == "1"


def cuda_wanted() -> bool | None:
    """Whether CUDA kernels were asked for (``TORCH_MTL_PYG_CUDA=1``) or forbidden (``=0``); None if neither."""
    value = os.environ.get("TORCH_MTL_PYG_CUDA", "")
    if value not in ("", "0", "1"):
        raise BuildError(f"TORCH_MTL_PYG_CUDA: expected 0 or 1, got {value!r}.")
    return None if value == "" else value == "1"


def find_cuda(csrc: Path, torch: Torch) -> Cuda:
    """Decides what becomes of the CUDA kernels: nvcc compiles them if torch has CUDA, or ``TORCH_MTL_PYG_CUDA=1``.

    Raises:
        BuildError: They were asked for and cannot be had.
    """
    wanted = cuda_wanted()
    if emulation() == "cuda":
        if wanted:
            raise BuildError("TORCH_MTL_PYG_CUDA=1 and TORCH_MTL_PYG_EMULATE=cuda exclude each other. Unset one.")
        return Cuda(emulated=True)
    if not any((csrc / "cuda").rglob("*.cu")):
        return Cuda()
    if wanted is False:
        return Cuda(reason="It has no CUDA kernels: TORCH_MTL_PYG_CUDA=0.")
    if not wanted and torch.cuda is None:
        return Cuda()
    if sys.platform != "linux":
        reason = f"there is no build of them for the platform {sys.platform!r}, only for Linux"
    elif program := _find_nvcc():
        own = [os.environ.get(name, "") for name in NVCC_VARIABLES]
        return Cuda(nvcc=Compiler((program,), " ".join([_identity([program]), *own])))
    else:
        reason = "nvcc was not found in CUDA_HOME, CUDA_PATH or PATH (install the CUDA toolkit, or set CUDA_HOME)"
    if wanted:
        raise BuildError(f"TORCH_MTL_PYG_CUDA=1, but there are no CUDA kernels: {reason}.")
    return Cuda(reason=f"It has no CUDA kernels: {reason}.")


def _find_nvcc() -> str | None:
    homes = [os.path.join(home, "bin") for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    for path in (*homes, None):
        if program := shutil.which("nvcc", path=path):
            return os.path.abspath(program)
    return None


def user_flags() -> tuple[str, ...]:
    """The flags in ``CXXFLAGS``."""
    return tuple(_split("CXXFLAGS", os.environ.get("CXXFLAGS", "")))


def find_compiler() -> Compiler:
    """Finds the compiler named by ``CXX``, or else c++, g++ or clang++ in ``PATH``. Starts no process.

    Raises:
        BuildError: There is none.
    """
    wanted = os.environ.get("CXX", "").strip()
    for words in [_split("CXX", wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if words and (program := shutil.which(words[0])):
            command = (os.path.abspath(program), *words[1:])
            return Compiler(command, _identity(command))
    looked = f"CXX={wanted!r} is not an executable file" if wanted else "looked for c++, g++ and clang++ in PATH"
    raise BuildError(f"No C++ compiler was found ({looked}). Install g++ or clang++, or set CXX to a C++17 compiler.")


def find_ninja() -> str:
    """Finds ninja: that of the ``ninja`` package, then of this environment's scripts folder, then of ``PATH``.

    Raises:
        BuildError: There is none.
    """
    folders = [sysconfig.get_path("scripts"), os.path.dirname(sys.executable)]
    try:
        import ninja

        folders.insert(0, str(ninja.BIN_DIR))
    except (ImportError, AttributeError):
        pass
    for path in (os.pathsep.join(folders), None):
        if program := shutil.which("ninja", path=path):
            return os.path.abspath(program)
    raise BuildError("ninja was not found, neither as a Python package nor in PATH. Install it: pip install ninja.")


def source_hash(csrc: Path) -> str:
    """Hash of all that determines the library apart from torch and the compilers: sources, flags, emulation."""
    flags = (ISA_FLAGS, COMMON_FLAGS, LINK_FLAGS, LINK_LIBRARIES)
    cuda_flags = (NVCC_FLAGS, NVCC_TARGETS, CUDA_EMULATION_FLAGS, CUDA_LINK_LIBRARIES)
    digest = hashlib.sha256(repr((flags, cuda_flags, emulation())).encode())
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in SOURCE_SUFFIXES):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(csrc).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def sources(csrc: Path, cuda: Cuda = Cuda()) -> list[Source]:
    """All files to compile, those with wider instruction sets last.

    Where CUDA kernels are emulated, ``cuda/<op>.cu`` takes the place of ``cpu/<op>.cpp``: both serve CPU tensors.

    Where several objects hold the same inline function, the linker keeps the first one. This order makes that one
    the version which runs on every CPU.
    """
    kernels = sorted((csrc / "cuda").rglob("*.cu")) if cuda.nvcc or cuda.emulated else []
    replaced = {csrc / "cpu" / f"{path.stem}.cpp" for path in kernels} if cuda.emulated else set()
    found = [Source(path, None) for path in kernels]
    for path in sorted(csrc.rglob("*.cpp")):
        if path.relative_to(csrc).parts[0] != "cuda" and path not in replaced:
            found.append(Source(path, _isa_of(path)))
    if not found:
        raise BuildError(f"There is no C++ source file in {csrc}.")
    ranks = [None, *ISA_FLAGS]
    return sorted(found, key=lambda source: ranks.index(source.isa))


def build(output: Path, *, csrc: Path, for_this_cpu: bool = False) -> str:
    """Compiles the sources below ``csrc`` into the shared library ``output``.

    Works in a temporary folder beside ``output``, which is replaced in one step when all is done: it is never seen
    half written. Reads ``CXX``, ``CXXFLAGS``, ``MAX_JOBS``, ``TORCH_MTL_PYG_CUDA`` and ``TORCH_MTL_PYG_EMULATE``.

    Args:
        output: The library to write. Its folder must exist.
        csrc: The root of the sources.
        for_this_cpu: Leave out instruction sets that this CPU is known not to have: half of the time.

    Returns:
        The `source_hash` of what was compiled; after a space "cuda", if the library has CUDA kernels.

    Raises:
        BuildError: Tools are missing, a command failed, or a source was edited meanwhile.
        OSError: A file could not be written.
    """
    link_flags = LINK_FLAGS.get(sys.platform)
    if link_flags is None:
        raise BuildError(f"There is no build for the platform {sys.platform!r}, only for Linux and macOS.")
    torch, compiler, ninja = torch_settings(), find_compiler(), find_ninja()
    csrc, output = csrc.resolve(), output.resolve()
    cuda = find_cuda(csrc, torch)
    before = source_hash(csrc)
    with tempfile.TemporaryDirectory(prefix="build-", dir=output.parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        foreign = foreign_isas() if for_this_cpu else frozenset()
        chosen, defines = _select(sources(csrc, cuda), compiler, folder, foreign)
        flags = [*COMMON_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}", *defines, *user_flags()]
        link = [*link_flags, f"-L{torch.lib}"]
        if cuda.nvcc:
            flags.append("-DMTL_WITH_CUDA")
            link += [*_cuda_folders(cuda.nvcc, folder), *CUDA_LINK_LIBRARIES]
        if cuda.emulated:
            link.append("-pthread")
        include = [f"-I{csrc}", *(word for path in torch.include for word in ("-isystem", str(path)))]
        text = _ninja_file(chosen, compiler, cuda, flags, include, [*link, *LINK_LIBRARIES])
        (folder / "build.ninja").write_text(text)
        _run([ninja, *_jobs()], folder, "The C++ sources did not compile.")
        if source_hash(csrc) != before:
            raise BuildError(f"The sources in {csrc} changed while they were compiled. Start again.")
        publish(folder / "library.so", output)
    return f"{before} cuda" if cuda.nvcc else before


def publish(file: Path, target: Path) -> None:
    """Moves a file to its final name (same file system) in one step that survives a crash of the machine."""
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(file, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:
        pass  # some file systems cannot sync a folder; the rename itself has been done
    finally:
        os.close(folder)


def isa_flags(isa: str) -> tuple[str, ...]:
    """The flags of an instruction set, with the emulation taken into account."""
    return ISA_FLAGS["avx2"] if isa in _EMULATED_ISAS and emulated() else ISA_FLAGS[isa]


def _isa_of(path: Path) -> str | None:
    for isa in sorted(ISA_FLAGS, key=len, reverse=True):
        if path.stem.endswith("_" + isa):
            return isa
    return None


def foreign_isas() -> frozenset[str]:
    """Instruction sets that this CPU does not have; none where the system does not list what it has."""
    if emulated():
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    features = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), None)
    if features is None:
        return frozenset()
    return frozenset(isa for isa, needed in ISA_FEATURES.items() if not needed <= set(features))


def _select(
    found: Iterable[Source], compiler: Compiler, folder: Path, foreign: frozenset[str]
) -> tuple[list[Source], list[str]]:
    """Leaves out what the CPU or the compiler does not know; returns the rest and the defines that say so."""
    (folder / "empty.cpp").write_text("")
    probe = [*compiler.command, "-c", "empty.cpp", "-o", "empty.o"]
    _run(probe, folder, f"The C++ compiler {shlex.join(compiler.command)} cannot compile an empty file.")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    found = list(found)
    missing = set()
    for isa in ISA_FLAGS:
        if isa != "baseline" and any(source.isa == isa for source in found):
            known = x86 and isa not in foreign
            known = known and subprocess.run([*probe, *isa_flags(isa)], cwd=folder, capture_output=True).returncode == 0
            if not known:
                missing.add(isa)
    defines = [f"-DMTL_WITHOUT_{isa.upper()}" for isa in ISA_FLAGS if isa in missing]
    if emulated():
        defines.append("-DMTL_EMULATE_AVX512")
    return [source for source in found if source.isa not in missing], defines


def _cuda_folders(nvcc: Compiler, folder: Path) -> list[str]:
    """Where the linker finds the libraries of nvcc's CUDA."""
    (folder / "empty.cu").write_text("")
    failure = "nvcc does not work (TORCH_MTL_PYG_CUDA=0 does without)."
    shown = _run([*nvcc.command, "--dryrun", "empty.cu"], folder, failure)
    line = next((line for line in shown.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    return [word for word in _split("nvcc --dryrun", line.partition("=")[2]) if word.startswith("-L")]


def nvcc_command(
    nvcc: Compiler,
    compiler: Compiler,
    flags: Iterable[str],
    include: Iterable[str],
    targets: Iterable[str] = NVCC_TARGETS,
) -> list[str]:
    """A call of nvcc that compiles the host's side as the C++ compiler would with ``flags``."""
    program = [word for word in compiler.command if not word.startswith("-")][-1]
    flags = [*(word for word in compiler.command if word.startswith("-")), *flags]
    # nvcc cuts these at commas, and hands them to a shell.
    host = (f"-Xcompiler={shlex.quote(word)}".replace(",", "\\,") for word in flags)
    return [*nvcc.command, "-ccbin", program, *NVCC_FLAGS, *targets, *include, *host]


def _ninja_file(
    chosen: Sequence[Source],
    compiler: Compiler,
    cuda: Cuda,
    flags: Sequence[str],
    include: Sequence[str],
    link: Sequence[str],
) -> str:
    command = _shell(compiler.command)
    lines = [
        "rule compile",
        f"  command = {command} {_shell([*flags, *include])} $own -c $source -o $out",
        "  description = compile $out",
        "rule link",
        f"  command = {command} $in -o $out {_shell(link)}",
        "  description = link $out",
    ]
    if cuda.nvcc:
        lines += [
            "rule compile_cuda",
            f"  command = {_shell(nvcc_command(cuda.nvcc, compiler, flags, include))} -c $source -o $out",
            "  description = compile $out",
        ]
    objects = [f"{index}_{source.path.stem}.o" for index, source in enumerate(chosen)]
    # The kernels, which take longest, first.
    for name, source in reversed(list(zip(objects, chosen, strict=True))):
        lines += [
            f"build {_path(name)}: compile{'_cuda' if source.cuda and cuda.nvcc else ''} {_path(str(source.path))}",
            f"  source = {_shell([str(source.path)])}",
            f"  own = {_shell(CUDA_EMULATION_FLAGS if source.cuda else isa_flags(source.isa) if source.isa else ())}",
        ]
    lines += [f"build library.so: link {' '.join(map(_path, objects))}", "default library.so", ""]
    return "\n".join(lines)


def _run(command: Sequence[str], folder: Path, failure: str) -> str:
    """Runs a command to its end, and returns what it printed."""
    # A job server of a surrounding make is of no use: its descriptors are not passed on.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{failure} {shlex.join(command)} could not be started: {error}.") from error
    if done.returncode != 0:
        raise BuildError(f"{failure} Exit status {done.returncode} of: {shlex.join(command)}", done.stdout)
    return done.stdout


def _jobs() -> list[str]:
    value = os.environ.get("MAX_JOBS", "").strip()
    if not value:
        return []
    if not value.isdecimal() or int(value) < 1:
        raise BuildError(f"MAX_JOBS: expected a positive integer, got {value!r}.")
    return ["-j", value]


def _identity(command: Sequence[str]) -> str:
    """Resolved path, size and time of every program in the command (``CXX="ccache g++"`` names two)."""
    parts = []
    for word in command:
        program = None if word.startswith("-") else shutil.which(word)
        if program is None:
            parts.append(word)
        else:
            resolved = os.path.realpath(program)
            stat = os.stat(resolved)
            parts.append(f"{resolved}:{stat.st_size}:{stat.st_mtime_ns}")
    return " ".join(parts)


def _split(name: str, value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{name}: expected words as in a shell, got {value!r} ({error}).") from error


def _shell(words: Iterable[str]) -> str:
    """Words as a shell command inside a ninja variable."""
    return shlex.join(words).replace("$", "$$")


def _path(name: str) -> str:
    """A path in a ninja build line."""
    return name.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
