"""The choice between the compiled and the reference implementation."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from extension_common import Project

from torch_mtl_pyg import _build, _extension, backend
from torch_mtl_pyg import ops as ops_package
from torch_mtl_pyg.backend import backend_info, resolve, use_backend, use_isa

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))) or sys.platform not in _build.LINK_FLAGS,
    reason="needs a C++ compiler, and a platform there is a build for",
)

LOADED = _extension.Extension(True, "jit", Path("library.so"), "Built it.")
MISSING = _extension.Extension(False, "none", None, "There is no compiler; install one.")


class FakeExtension:
    """Stands in for the loader; counts how often it is asked."""

    def __init__(self) -> None:
        self.result, self.calls, self.registered = LOADED, 0, 0

    def load(self) -> _extension.Extension:
        self.calls += 1
        return self.result

    def register(self) -> None:
        self.registered += 1


class FakeOps:
    """Stands in for the compiled ops that tell and set the instruction set."""

    def __init__(self) -> None:
        self.current = "avx2"

    def isa(self) -> str:
        return self.current

    def isas_available(self) -> str:
        return "baseline,avx2"

    def set_isa(self, name: str) -> None:
        self.current = name


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> FakeExtension:
    """A process in which nothing has been loaded or chosen yet."""
    fake = FakeExtension()
    monkeypatch.setattr(_extension, "load", fake.load)
    monkeypatch.setattr(ops_package, "register", fake.register)
    for name, value in {"_choice": "auto", "_fused": None, "_ready": False, "_warned": False}.items():
        monkeypatch.setattr(backend, name, value)
    monkeypatch.delenv("TORCH_MTL_PYG_ISA", raising=False)
    return fake


@pytest.fixture
def ops(extension: FakeExtension, monkeypatch: pytest.MonkeyPatch) -> FakeOps:
    fake = FakeOps()
    stand_in = SimpleNamespace(
        ops=SimpleNamespace(torch_mtl_pyg=fake), get_num_threads=torch.get_num_threads, __version__=torch.__version__
    )
    monkeypatch.setattr(backend, "torch", stand_in)
    return fake


def test_reference_never_loads(extension: FakeExtension) -> None:
    use_backend("reference")
    assert resolve() is False
    assert backend_info().backend == "reference"
    assert extension.calls == 0


def test_auto_uses_what_loads(extension: FakeExtension) -> None:
    assert resolve() is True
    assert resolve() is True
    assert extension.calls == 1
    use_backend("fused")
    assert extension.registered == 1


def test_auto_warns_once_and_falls_back(extension: FakeExtension) -> None:
    extension.result = MISSING
    with pytest.warns(RuntimeWarning, match="There is no compiler; install one") as caught:
        assert resolve() is False
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve() is False
        use_backend("reference")
        use_backend("auto")
        assert resolve() is False


def test_fused_that_cannot_load_raises_and_changes_nothing(extension: FakeExtension) -> None:
    extension.result = MISSING
    use_backend("reference")
    with pytest.raises(RuntimeError, match=r'"fused" was asked for.*There is no compiler; install one'):
        use_backend("fused")
    assert resolve() is False
    assert backend_info().choice == "reference"


def test_fused_from_the_environment_raises_at_every_use(
    extension: FakeExtension, monkeypatch: pytest.MonkeyPatch
) -> None:
    extension.result = MISSING
    monkeypatch.setattr(backend, "_choice", "fused")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="There is no compiler"):
            resolve()
    assert backend_info().backend == "unavailable"
    with use_backend("reference"):
        assert resolve() is False
    with pytest.raises(RuntimeError, match="There is no compiler"):
        resolve()


def test_context_managers_nest_and_restore(extension: FakeExtension) -> None:
    use_backend("fused")
    with use_backend("reference"):
        assert resolve() is False
        with use_backend("auto"):
            assert resolve() is True
            with use_backend("reference"):
                assert resolve() is False
            assert backend._choice == "auto"
        assert resolve() is False
    assert resolve() is True
    assert backend._choice == "fused"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend._choice == "fused"


def test_one_context_manager_used_twice(extension: FakeExtension) -> None:
    reference = use_backend("reference")
    with reference:
        assert resolve() is False
    assert backend._choice == "auto"
    use_backend("fused")
    with reference, reference:
        assert resolve() is False
    assert backend._choice == "fused"


@pytest.mark.parametrize("name", ["fast", "Reference", ""])
def test_unknown_name(extension: FakeExtension, name: str) -> None:
    with pytest.raises(ValueError, match=rf"name: expected one of 'reference', 'fused', 'auto', got '{name}'"):
        use_backend(name)  # type: ignore[arg-type]
    assert backend._choice == "auto"


def test_name_that_is_no_string(extension: FakeExtension) -> None:
    with pytest.raises(TypeError, match="got bool"):
        use_backend(True)  # type: ignore[arg-type]


def test_isa_of_the_environment_is_applied_once(
    extension: FakeExtension, ops: FakeOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_MTL_PYG_ISA", "baseline")
    assert resolve() is True
    assert ops.current == "baseline"
    assert backend_info().isa == "baseline"
    ops.current = "avx2"
    use_backend("fused")
    assert ops.current == "avx2"


@pytest.mark.parametrize(("name", "why"), [("avx512", "does not have"), ("sse9", "not known")])
def test_isa_of_the_environment_is_never_ignored(
    extension: FakeExtension, ops: FakeOps, monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.setenv("TORCH_MTL_PYG_ISA", name)
    for call in (resolve, resolve, backend_info, lambda: use_backend("fused")):
        with pytest.raises(
            ValueError, match=rf"TORCH_MTL_PYG_ISA: expected one of baseline, avx2, got '{name}'.*{why}"
        ):
            call()
    use_backend("reference")
    assert resolve() is False


def test_use_isa(extension: FakeExtension, ops: FakeOps) -> None:
    with use_isa("baseline"):
        assert ops.current == "baseline"
    assert ops.current == "avx2"
    with pytest.raises(KeyError), use_isa("baseline"):
        raise KeyError
    assert ops.current == "avx2"
    with pytest.raises(ValueError, match="name: expected one of"), use_isa("avx512"):
        pass
    extension.result = MISSING
    with pytest.raises(RuntimeError, match="There is no compiler"), use_isa("baseline"):
        pass


def test_info(extension: FakeExtension, ops: FakeOps) -> None:
    info = backend_info()
    assert (info.backend, info.reason, info.isa, info.choice) == ("fused", LOADED.reason, "avx2", "auto")
    assert info.threads == torch.get_num_threads()
    assert info.cache_dir == str(_extension.cache_folder())
    assert set(info.versions) == {"torch_mtl_pyg", "torch", "torch_geometric", "python", "compiler"}
    text = str(info)
    for part in ("fused (choice: auto)", LOADED.reason, "avx2", info.cache_dir, *info.versions, torch.__version__):
        assert part in text
    with pytest.raises(AttributeError):
        info.backend = "reference"  # type: ignore[misc]


# --- in fresh processes, with a library that is really built and loaded -----------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One checkout, and so one build, for all tests below."""
    return Project(tmp_path_factory.mktemp("project"))


COMPILED = """
import torch, warnings
from torch_mtl_pyg import backend, use_backend
from torch_mtl_pyg.backend import resolve
traces = []
def count(graph, inputs):
    traces.append(1)
    return graph
@torch.compile(fullgraph=True, backend=count)
def f(x):
    return x + 1 if resolve() else x - 1
x = torch.zeros(2)
def check(expected):
    for _ in range(2):
        assert f(x).tolist() == [expected] * 2, (f(x), expected)
"""


@needs_compiler
def test_compiled_function_follows_the_choice(project: Project) -> None:
    code = COMPILED + (
        "check(1.0)\n"  # the first use of the backend in this process
        "for name, expected in [('reference', -1.0), ('fused', 1.0), ('reference', -1.0), ('auto', 1.0)]:\n"
        "    use_backend(name); check(expected)\n"
        "    with use_backend('reference'): check(-1.0)\n"
        "    check(expected)\n"
        "assert len(traces) == 2, traces\n"
    )
    done = project.run("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_module_prints_the_backend(project: Project) -> None:
    done = project.run("-m", "torch_mtl_pyg", TORCH_MTL_PYG_ISA="avx2")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if not line.startswith(("instr", "cache")))
    assert rows["backend"] == "fused (choice: auto)"
    assert str(project.cache) in rows["reason"]
    assert rows["torch"] == torch.__version__
    assert rows["python"] == sys.version.split()[0]
    assert "instruction set  avx2\n" in done.stdout
    assert f"cache folder     {project.cache}\n" in done.stdout


@needs_compiler
def test_failing_compiler_in_a_fresh_process(project: Project) -> None:
    code = COMPILED + (
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    check(-1.0); use_backend('reference'); check(-1.0); use_backend('auto'); check(-1.0); resolve()\n"
        "caught = [w for w in caught if issubclass(w.category, RuntimeWarning)]\n"
        "assert len(caught) == 1, caught\n"
        "assert 'cannot compile an empty file' in str(caught[0].message)\n"
        "try: use_backend('fused')\n"
        "except RuntimeError as error: assert 'cannot compile an empty file' in str(error)\n"
        "else: raise AssertionError\n"
    )
    done = project.run("-c", code, CXX="false")
    assert done.returncode == 0, done.stderr


def test_environment_chooses_the_backend(project: Project) -> None:
    code = (
        "import os\n"
        "try: import torch_mtl_pyg.backend\n"
        "except ValueError as error: print(error)\n"
        "else: raise AssertionError\n"
        "os.environ['TORCH_MTL_PYG_BACKEND'] = 'reference'\n"
        "from torch_mtl_pyg import backend_info\n"
        "from torch_mtl_pyg.backend import resolve\n"
        "assert resolve() is False\nassert backend_info().backend == 'reference'\n"
    )
    done = project.run("-c", code, CXX="no-such-compiler", TORCH_MTL_PYG_BACKEND="best")
    assert done.returncode == 0, done.stderr
    expected = "environment variable TORCH_MTL_PYG_BACKEND: expected one of 'reference', 'fused', 'auto', got 'best'."
    assert done.stdout.strip() == expected
