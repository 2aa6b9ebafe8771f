"""Every CUDA kernel compiles for every architecture, spills nothing, and stands in the table of registers."""

from __future__ import annotations

from pathlib import Path

import cuda_resources as resources
import pytest

NVCC = resources.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found in CUDA_HOME, CUDA_PATH or PATH")


@pytest.fixture(scope="module")
def kernels() -> list[resources.Kernel]:
    return resources.compile_kernels(NVCC)


def test_no_kernel_spills(kernels: list[resources.Kernel]) -> None:
    assert {kernel.architecture for kernel in kernels} == set(resources.ARCHITECTURES)
    assert [kernel for kernel in kernels if kernel.spilled or kernel.stack] == []


def test_the_table_is_that_of_the_kernels(kernels: list[resources.Kernel]) -> None:
    text = resources.TABLE.read_text()
    version, listed = resources.listed(text)
    assert listed == {(kernel.file, kernel.name) for kernel in kernels}, f"to write it again: {resources.HOW}"
    if version == resources.nvcc_version(NVCC):  # another one may need other numbers of registers
        assert text == resources.table(kernels, version), f"to write it again: {resources.HOW}"


def test_a_spill_is_seen(tmp_path: Path) -> None:
    """So that the tests above can fail."""
    file = tmp_path / "bad.cu"
    file.write_text(
        "namespace mtl::cuda {\n"
        "template <int N> __global__ void __launch_bounds__(1024, 2) spilling(const float* in, float* out) {\n"
        "  float a[N];\n"
        "  for (int i = 0; i < N; ++i) a[i] = in[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "  for (int j = 0; j < 9; ++j)\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < N; ++i) a[i] = a[i] * a[(i + 7) % N] + in[j];\n"
        "  for (int i = 0; i < N; ++i) out[i * 1024 + threadIdx.x] = a[i];\n"
        "}\n"
        "template __global__ void spilling<64>(const float*, float*);\n"
        "__global__ void fine(int* out) { __shared__ int one[8]; one[threadIdx.x] = 1; *out = one[threadIdx.x ^ 1]; }\n"
        "__global__ void indexed(int* out, int i) { int a[99]; for (int& e : a) e = *out++; *out = a[i]; }\n"
        "}\n"
    )
    found = {kernel.name: kernel for kernel in resources.compile_kernels(NVCC, [file])}
    assert set(found) == {"spilling<64>", "fine", "indexed"}
    assert found["spilling<64>"].spilled > 0
    assert (found["fine"].spilled, found["fine"].stack, found["fine"].shared) == (0, 0, 32)
    assert found["indexed"].stack > 0


def test_a_file_that_does_not_compile(tmp_path: Path) -> None:
    file = tmp_path / "bad.cu"
    file.write_text("#error here\n")
    with pytest.raises(RuntimeError, match=r"bad.cu does not compile for sm_80"):
        resources.compile_kernels(NVCC, [file])
