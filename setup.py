"""Builds the wheel; the metadata is in pyproject.toml.

With torch and a compiler in the build environment (``--no-build-isolation``), the wheel holds the compiled library
``torch_mtl_pyg/_C.abi3.so``, which works with every Python >= 3.10 and torch >= 2.10. Otherwise it is a pure-Python
wheel. Both hold the C++ sources, so that the library can be built at first use.

``TORCH_MTL_PYG_BUILD=0`` asks for the pure wheel, ``=1`` makes it an error if the library cannot be compiled.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LIBRARY, STAMP = "_C.abi3.so", "_C.hash"


def load_build_module() -> ModuleType:
    """Imports torch_mtl_pyg/_build.py alone: the package itself needs torch."""
    name = "torch_mtl_pyg_build"
    spec = importlib.util.spec_from_file_location(name, ROOT / "torch_mtl_pyg" / "_build.py")
    if spec is None or spec.loader is None:
        raise SystemExit("torch_mtl_pyg/_build.py cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def wanted() -> bool:
    """Whether to compile the library; whether that may fail is `demanded`."""
    value = os.environ.get("TORCH_MTL_PYG_BUILD", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"TORCH_MTL_PYG_BUILD: expected 0 or 1, got {value!r}.")
    if value == "":
        return importlib.util.find_spec("torch") is not None
    return value == "1"


def demanded() -> bool:
    """Whether it is an error if the library cannot be compiled."""
    return os.environ.get("TORCH_MTL_PYG_BUILD") == "1"


class BuildLibrary(build_ext):
    """Compiles csrc/ with torch_mtl_pyg/_build.py in place of setuptools' own compiler."""

    def run(self) -> None:
        """Compiles into the build folder; for an editable install, into the package."""
        if self.extensions:
            package = Path(self.get_finalized_command("build_py").get_package_dir("torch_mtl_pyg"))
            self.folder = ROOT / package if self.inplace else Path(self.build_lib) / "torch_mtl_pyg"
            self.compile()

    def compile(self) -> None:
        """Writes the library and its stamp, or turns the wheel into a pure one."""
        build = load_build_module()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, STAMP):  # of an earlier build, perhaps of other sources
            (self.folder / name).unlink(missing_ok=True)
        try:
            compiled = build.build(self.folder / LIBRARY, csrc=CSRC)
            (self.folder / STAMP).write_text(compiled + "\n")
        except (build.BuildError, ImportError, OSError) as error:
            text = f"{error}\n{getattr(error, 'output', '')}".rstrip()
            if demanded():
                raise SystemExit(f"TORCH_MTL_PYG_BUILD=1, but the C++ library could not be built. {text}") from error
            warnings.warn(
                f"The C++ library was not built ahead of time; it will be built at first use. {text}", stacklevel=1
            )
            self.extensions = []
            self.distribution.ext_modules = []

    def get_outputs(self) -> list[str]:
        """The files written."""
        return [str(self.folder / name) for name in (LIBRARY, STAMP)] if self.extensions else []

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing to map: an editable install has the files in the package already."""
        return {}

    def get_source_files(self) -> list[str]:
        """The sources reach an sdist through MANIFEST.in."""
        return []


class Wheel(bdist_wheel):
    """Tags the wheel by what was compiled: cp310-abi3-<platform>, or py3-none-any."""

    def run(self) -> None:
        """Compiles first, since the layout of the wheel depends on whether that works."""
        # setuptools keeps its copy of the package; a file since deleted from the checkout would reach the wheel.
        shutil.rmtree(Path(self.get_finalized_command("build").build_lib) / "torch_mtl_pyg", ignore_errors=True)
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """The library has no Python symbols, so one wheel serves every Python from 3.10 on."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("cp310", "abi3", platform)


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["torch_mtl_pyg", "torch_mtl_pyg.*"]), "torch_mtl_pyg._csrc"],
        package_dir={"torch_mtl_pyg._csrc": "csrc"},
        package_data={
            "torch_mtl_pyg": ["py.typed"],
            "torch_mtl_pyg._csrc": ["**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh"],
        },
        include_package_data=False,
        ext_modules=[Extension("torch_mtl_pyg._C", sources=[])] if wanted() else [],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    )
