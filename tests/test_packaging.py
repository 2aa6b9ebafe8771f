"""Wheels: what they hold, how they are tagged, and that they work once installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from extension_common import COMPILER, Project

from torch_mtl_pyg import _build
from torch_mtl_pyg._version import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def release_of(distribution: str) -> int:
    """The major release, 0 if not installed.

    From the metadata: looking for pip as a module makes setuptools' import hook leave the imports of distutils to the
    standard library, after which setuptools itself cannot be imported any more.
    """
    try:
        return int(metadata.version(distribution).split(".")[0])
    except metadata.PackageNotFoundError:
        return 0


pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a checkout"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform not in _build.LINK_FLAGS, reason="there is no build for this platform"),
    pytest.mark.skipif(release_of("pip") == 0, reason="needs pip"),
]


needs_setuptools = pytest.mark.skipif(release_of("setuptools") < 77, reason="needs setuptools >= 77")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A checkout with the real build files and a small csrc/."""
    made = Project(tmp_path / "checkout")
    for name in PROJECT_FILES:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, made.root)
        else:
            (made.root / name).write_text(f"{name}\n")
    return made


def pip(project: Project, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs pip without the checkout in Python's path."""
    environment = {**project.environment(**extra), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    del environment["PYTHONPATH"]
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True, timeout=300)


def make_wheel(project: Project, *options: str, **extra: str) -> Path:
    """Builds the one wheel of a project in the environment of the tests."""
    folder = project.root / "dist"
    done = pip(project, "wheel", "-q", "--no-deps", "-w", str(folder), *options, ".", **extra)
    if done.returncode != 0 and "--no-build-isolation" not in options and "setuptools>=77" in done.stdout + done.stderr:
        pytest.skip(f"an isolated build needs a package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> set[str]:
    """Installs a wheel in a folder; returns the names of its files."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        return set(archive.namelist())


def info(project: Project, site: Path, **extra: str) -> str:
    """What ``python -m torch_mtl_pyg`` prints for a package installed in ``site``."""
    done = project.run(
        "-P" if sys.version_info >= (3, 11) else "-s", "-m", "torch_mtl_pyg", PYTHONPATH=str(site), **extra
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def carried(csrc: Path) -> set[str]:
    """The sources below csrc/, under their names in a wheel."""
    files = (path for path in csrc.rglob("*") if path.suffix in _build.SOURCE_SUFFIXES)
    return {f"torch_mtl_pyg/_csrc/{path.relative_to(csrc).as_posix()}" for path in files}


def test_isolated_wheel_builds_at_first_use(project: Project, tmp_path: Path) -> None:
    (project.csrc / "cuda").mkdir()
    for name in ("kernel.cu", "kernel.cuh"):
        (project.csrc / "cuda" / name).write_text("#error not for the C++ compiler\n")
    wheel = make_wheel(project)
    assert wheel.name == f"torch_mtl_pyg-{__version__}-py3-none-any.whl"
    names = unpack(wheel, tmp_path / "site")
    assert carried(project.csrc) <= names
    assert not [name for name in names if name.endswith((".so", ".hash"))]
    shutil.move(project.csrc, project.root / "hidden")  # the installed package must not need the checkout
    text = info(project, tmp_path / "site")
    assert "fused (choice: auto)" in text
    assert "Built" in text
    assert str(project.cache) in text


@needs_setuptools
def test_wheel_with_torch_holds_the_library(project: Project, tmp_path: Path) -> None:
    (project.package / "_C.abi3.so").write_text("left by an editable install")
    wheel = make_wheel(project, "--no-build-isolation")
    tag = wheel.stem.split("-", 2)[2]
    assert tag.startswith("cp310-abi3-")
    assert tag != "cp310-abi3-any"
    names = unpack(wheel, tmp_path / "site")
    assert carried(project.csrc) | {"torch_mtl_pyg/_C.abi3.so", "torch_mtl_pyg/_C.hash"} <= names
    text = info(project, tmp_path / "site", CXX="no-such-compiler", PATH="")
    assert "fused (choice: auto)" in text
    assert f"Loaded the prebuilt library {tmp_path / 'site'}" in text
    assert not project.cache.exists()


@needs_setuptools
def test_wheel_without_a_working_compiler(project: Project) -> None:
    done = pip(project, "wheel", "--no-deps", "--no-build-isolation", ".", CXX="false", TORCH_MTL_PYG_BUILD="1")
    assert done.returncode != 0
    assert "TORCH_MTL_PYG_BUILD=1, but the C++ library could not be built" in done.stdout + done.stderr
    wheel = make_wheel(project, "--no-build-isolation", CXX="false")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert carried(project.csrc) <= set(archive.namelist())
        assert not [name for name in archive.namelist() if "_C." in name]


@needs_setuptools
def test_build_can_be_switched_off(project: Project) -> None:
    assert make_wheel(project, "--no-build-isolation", TORCH_MTL_PYG_BUILD="0").name.endswith("-py3-none-any.whl")


@needs_setuptools
def test_editable_build_lies_beside_the_sources(project: Project) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=project.root, env=project.environment(), check=True, capture_output=True, timeout=120)
    assert "Loaded the prebuilt library" in info(project, project.root)
    with open(project.csrc / "library.cpp", "a") as stream:
        stream.write("// edited since\n")
    text = info(project, project.root, CXX="no-such-compiler")
    assert "was not used: it was built from other sources" in text
    assert "reference (choice: auto)" in text


def test_every_source_is_hashed_and_shipped() -> None:
    """Both go by the suffix: a header with another one would be missing in wheels, and edits to it unnoticed."""
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.suffix != ".md"]
    assert [str(path) for path in files if path.suffix not in _build.SOURCE_SUFFIXES] == []


def test_real_sources_build_and_load() -> None:
    """Uses the cache of the user: the other tests need the same library, so that it is built once for all of them."""
    if not (ROOT / "csrc" / "library.cpp").is_file():
        pytest.skip("needs csrc/")
    code = (
        "import torch\n"
        "from torch_mtl_pyg import _extension\n"
        "extension = _extension.load()\n"
        "assert extension.loaded, extension.reason\n"
        "print(torch.ops.torch_mtl_pyg.isas_available())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    available = done.stdout.strip().split(",")
    assert available[0] == "baseline"
    assert set(available) <= set(_build.ISA_FLAGS)
