"""The CUDA backend: arithmetic and launches on a CPU (see cuda_emulation.h), and all of it where there is a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

import chatglm.kernels
from chatglm.kernels import KernelUnavailable, reference
from chatglm.kernels.cache_files import cache_folder, damaged_files
from chatglm.kernels.cuda import backend as cuda
from chatglm.kernels.cuda import compile as cuda_compile
from chatglm.kernels.cuda import driver as cuda_driver

HERE = Path(__file__).parent
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: The relative error that rounding the result alone may cause.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
#: Relative error of a whole product that is allowed where weights are rounded to the dtype before cuBLAS multiplies.
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-5}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch built for it")
needs_emulation = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="the emulation needs Linux and g++"
)

MatrixAndInput = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_case(
    rows: int,
    out: int,
    columns: int,
    bits: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype = torch.float16,
    device: str = "cpu",
) -> MatrixAndInput:
    """x, weight, scale, the exact product in float64 and the product of the absolute values."""
    generator = torch.Generator(device).manual_seed(rows * 1000 + out)
    half = 1 << (bits - 1)
    q = torch.randint(-half, half, (out, columns), generator=generator, dtype=torch.int8, device=device)
    scale = (torch.rand(out, generator=generator, device=device) * 0.01 + 1e-4).to(scale_dtype)
    x = torch.randn(rows, columns, generator=generator, device=device).to(dtype)
    matrix = (q.double() * scale.double()[:, None]).T
    return x, reference.pack(q, bits), scale, x.double() @ matrix, x.double().abs() @ matrix.abs()


def check_product(backend: cuda.CUDABackend, bits: int, case: MatrixAndInput, exact_to: float = 1e-6) -> None:
    """The fused kernels: one rounding and float32 sums. Others: the weights were rounded too."""
    x, weight, scale, expected, size = case
    y = backend.linear(x, weight, scale, bits, "default")
    assert y.shape == expected.shape and y.dtype == x.dtype
    error = (y.double() - expected).abs()
    if len(x) <= cuda.FUSED_ROWS and x.shape[1] % 32 == 0:
        assert (error <= ROUNDING[x.dtype] * expected.abs() + exact_to * size).all(), (
            bits,
            x.dtype,
            x.shape,
            len(scale),
        )
    else:
        assert error.norm() <= LIMITS[x.dtype] * expected.norm(), (bits, x.dtype, x.shape, len(scale))


# ---- the emulation -------------------------------------------------------------------------------------------------


class FakeCompiler:
    """Makes no code, but counts and can fail."""

    name = "a compiler"

    def __init__(self, error: str | None = None) -> None:
        self.targets: list[str] = []
        self._error = error

    def architectures(self) -> list[int]:
        return [75, 80, 86, 90]

    def compile(self, source: str, target: str) -> bytes:
        self.targets.append(target)
        if self._error:
            raise KernelUnavailable(self._error)
        return b"code for " + target.encode()


class OnDevice(torch.Tensor):
    """A tensor in main memory that claims to be on a GPU."""

    number = 0

    def get_device(self) -> int:
        return self.number


class OnSecondDevice(OnDevice):
    number = 1


@pytest.fixture(scope="session")
def build_driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], ctypes.CDLL]:
    built: dict[int, ctypes.CDLL] = {}

    def build(architecture: int) -> ctypes.CDLL:
        if architecture not in built:
            file = tmp_path_factory.mktemp("driver") / f"libcuda-{architecture}.so"
            command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-DARCHITECTURE={architecture}0"]
            command += [f'-DSOURCE="{cuda.SOURCE}"', "-o", str(file), str(HERE / "fake_cuda_driver.cpp"), "-ldl"]
            subprocess.run(command, check=True)
            built[architecture] = ctypes.CDLL(str(file))
            built[architecture].fake_log.restype = ctypes.c_char_p
        return built[architecture]

    return build


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, and no cpm_kernels whether or not it is installed."""
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "cpm_kernels", None)
    yield


@pytest.fixture
def driver(build_driver: Callable[[int], ctypes.CDLL], fresh: None) -> Iterator[ctypes.CDLL]:
    library = build_driver(90)
    library.fake_reset()
    yield library
    library.fake_reset()


def make_backend(library: ctypes.CDLL, architecture: int = 90, stream: int = 7) -> cuda.CUDABackend:
    return cuda.CUDABackend(
        cuda_driver.Driver(library),
        FakeCompiler(),
        capability=lambda index: divmod(architecture, 10),
        stream=lambda index: stream + index,
    )


def logged(library: ctypes.CDLL, function: str) -> list[str]:
    return [line for line in library.fake_log().decode().splitlines() if line.startswith(function + " ")]


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", [75, 90])
def test_products_equal_float64(
    build_driver: Callable[[int], ctypes.CDLL], fresh: None, architecture: int, bits: int, dtype: torch.dtype
) -> None:
    backend = make_backend(build_driver(architecture), architecture)
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33):
        check_product(backend, bits, random_case(rows, 37, 288, bits, dtype, DTYPES[rows % 3]))
    for rows, out, columns in ((1, 19, 13696), (2, 3, 4096), (20, 1, 32), (3, 70, 64), (11, 33, 2080)):
        check_product(backend, bits, random_case(rows, out, columns, bits, dtype))
    for rows, columns in ((1, 2), (3, 70), (40, 14)):  # no multiple of 32: the weights are expanded
        check_product(backend, bits, random_case(rows, 5, columns, bits, dtype))


@needs_emulation
@pytest.mark.parametrize("bits", [4, 8])
def test_expansion_equals_plain_torch_bit_for_bit(driver: ctypes.CDLL, bits: int) -> None:
    backend = make_backend(driver)
    every_byte = torch.arange(-128, 128).to(torch.int8).repeat(3, 2)  # (3, 512): columns are a multiple of 32
    for weight in (every_byte, every_byte[:, :263].contiguous(), every_byte.flatten()[1:].view(1, -1)):
        for scale_dtype in DTYPES:
            scale = torch.tensor([0.0123, 1e-7, 60000.0])[: len(weight)].to(scale_dtype)
            for dtype in DTYPES:
                expected = reference.dequantize(weight, scale, bits, dtype)
                assert torch.equal(backend.dequantize(weight, scale, bits, dtype), expected)
    broken = torch.tensor([torch.inf, torch.nan, 0.0])
    for dtype in DTYPES:
        actual = backend.dequantize(every_byte, broken, bits, dtype)
        torch.testing.assert_close(
            actual, reference.dequantize(every_byte, broken, bits, dtype), rtol=0, atol=0, equal_nan=True
        )
    assert backend.dequantize(torch.zeros(0, 16, dtype=torch.int8), torch.zeros(0), bits, dtype).shape == (
        0,
        128 // bits,
    )


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_the_others(driver: ctypes.CDLL, bits: int, dtype: torch.dtype) -> None:
    backend = make_backend(driver)
    x, weight, scale, *_ = random_case(32, 21, 2048, bits, dtype)
    alone = backend.linear(x[4:5], weight, scale, bits)
    for rows in (5, 9, 17, 32):
        assert torch.equal(backend.linear(x[:rows], weight, scale, bits)[4:5], alone)
    others = torch.full_like(x, torch.nan)
    others[4] = x[4]
    y = backend.linear(others[:5], weight, scale, bits)  # the memory behind it holds NaN, too
    assert torch.equal(y[4:5], alone)
    assert y[:4].isnan().all()


@needs_emulation
def test_any_address_will_do(driver: ctypes.CDLL) -> None:
    backend = make_backend(driver)
    x, weight, scale, expected, _ = random_case(2, 6, 64, 8, torch.float32)
    x_shifted = torch.cat((torch.zeros(1), x.flatten()))[1:].view(2, 64)
    weight_shifted = torch.cat((torch.zeros(3, dtype=torch.int8), weight.flatten()))[3:].view(6, 64)
    for a, b in ((x_shifted, weight), (x, weight_shifted)):
        torch.testing.assert_close(backend.linear(a, b, scale, 8).double(), expected, rtol=1e-5, atol=1e-6)


@needs_emulation
def test_large_matrices_are_expanded_slice_by_slice(driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "SLICE", 1000)
    check_product(make_backend(driver), 4, random_case(40, 37, 288, 4, torch.float32))
    assert [re.findall(r"grid (\d+)", line)[0] for line in logged(driver, "cuLaunchKernel")] == ["3"] * 12 + ["1"]


# ---- launches ------------------------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.parametrize(
    ("rows", "dtype", "kernel", "grid"),
    [
        (1, torch.float16, "rows_int4_f16_8", "5 1 1"),
        (8, torch.bfloat16, "rows_int4_bf16_8", "5 1 1"),
        (9, torch.float16, "rows_int4_f16_16", "3 1 1"),
        (17, torch.bfloat16, "rows_int4_bf16_32", "3 1 1"),
        (1, torch.float32, "rows_int4_f32_1", "3 1 1"),
        (3, torch.float32, "rows_int4_f32_4", "3 1 1"),
        (20, torch.float32, "rows_int4_f32_8", "3 3 1"),
        (33, torch.float16, "dequantize_int4_f16", "66 1 1"),
    ],
)
def test_kernel_grid_and_stream(driver: ctypes.CDLL, rows: int, dtype: torch.dtype, kernel: str, grid: str) -> None:
    backend = make_backend(driver, stream=99)
    x, weight, scale, *_ = random_case(rows, 66, 64, 4, dtype)
    backend.linear(x.as_subclass(OnDevice), weight.as_subclass(OnDevice), scale, 4)
    assert logged(driver, "cuLaunchKernel") == [
        f"cuLaunchKernel {kernel} grid {grid} block 256 1 1 shared 0 stream 99 on 0"
    ]
    assert driver.fake_depth() == 0


@needs_emulation
def test_each_device_has_its_own_module_context_and_stream(driver: ctypes.CDLL) -> None:
    compiler = FakeCompiler()
    backend = cuda.CUDABackend(
        cuda_driver.Driver(driver),
        compiler,
        capability=lambda index: [(8, 9), (12, 0)][index],
        stream=lambda index: [0, 5][index],
    )
    x, weight, scale, expected, _ = random_case(1, 4, 32, 8, torch.float32)
    for kind in (OnDevice, OnSecondDevice, OnDevice, OnSecondDevice):
        y = backend.linear(x.as_subclass(kind), weight.as_subclass(kind), scale, 8)
        torch.testing.assert_close(y.as_subclass(torch.Tensor).double(), expected, rtol=1e-5, atol=1e-6)
    assert compiler.targets == ["sm_86", "compute_90"]
    # Mode 2: a graph that this thread may be capturing is not disturbed; before and after it is another one.
    assert logged(driver, "cuModuleLoadData") == [
        "cuModuleLoadData on 0 mode 2 code",
        "cuModuleLoadData on 1 mode 2 code",
    ]
    assert [line[-13:] for line in logged(driver, "cuLaunchKernel")] == ["stream 0 on 0", "stream 5 on 1"] * 2
    assert backend.describe()["cuda:1"] == "compute_90, launched through the CUDA driver"


@needs_emulation
def test_threads_load_a_module_once(driver: ctypes.CDLL) -> None:
    backend = make_backend(driver)
    together = threading.Barrier(8)
    devices: list[cuda.Device] = []

    def prepare() -> None:
        together.wait()
        devices.append(backend.prepare(0))

    threads = [threading.Thread(target=prepare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(devices) == 8 and len(set(map(id, devices))) == 1
    assert len(logged(driver, "cuModuleLoadData")) == 1


@needs_emulation
def test_errors_of_the_driver(driver: ctypes.CDLL) -> None:
    x, weight, scale, *_ = random_case(1, 4, 32, 8, torch.float32)
    driver.fake_fail(b"cuModuleLoadData", 209)
    with pytest.raises(KernelUnavailable, match=r"sm_90 could not be loaded: .*no kernel image is available.*209"):
        make_backend(driver).linear(x, weight, scale, 8)
    assert driver.fake_depth() == 0

    driver.fake_fail(b"cuLaunchKernel", 700)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel: something else \(CUDA error 700\)"):
        make_backend(driver).linear(x, weight, scale, 8)
    assert driver.fake_depth() == 0

    driver.fake_fail(b"cuInit", 100)
    with pytest.raises(KernelUnavailable, match=r"driver does not start: cuInit: something else"):
        cuda_driver.Driver(driver)


@needs_emulation
def test_gpus_before_turing_are_refused(driver: ctypes.CDLL) -> None:
    with pytest.raises(KernelUnavailable, match="sm_70"):
        make_backend(driver, architecture=70).prepare(0)


def test_every_kernel_that_is_named_is_in_the_source() -> None:
    source = cuda.SOURCE.read_text(encoding="utf-8")
    assert f"WARPS = {cuda.THREADS // 32};" in source
    assert f"FLOAT_OUT = {cuda.FLOAT_OUT * 32 // cuda.THREADS};" in source
    for count, columns in cuda.TENSOR_CORE_ROWS.items():
        assert re.search(rf"ROWS\(BITS, TYPE, NAME, {columns // 16}, {count // 8}, {count}, ", source)
    assert len(cuda.kernel_names(75)) == 20 and len(cuda.kernel_names(90)) == 26


# ---- cpm_kernels ---------------------------------------------------------------------------------------------------

CPM_KERNELS = """
calls = []

class LazyKernelCModule:
    def __init__(self, code):
        self.code = code

class KernelFunction:
    def __init__(self, module, name):
        self.module, self.name = module, name
    def _prepare_func(self):
        {prepare}
    def __call__(self, grid, block, shared_bytes, stream, params):
        calls.append((self.module.code, self.name, grid, block, shared_bytes, stream, [p.value for p in params[4:]]))
"""


def install_cpm_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, on_import: str = "", prepare: str = "pass"
) -> None:
    """Something with the interface of cpm_kernels 1.0.11, for this test alone."""
    package = folder / "cpm_kernels" / "kernels"
    package.mkdir(parents=True)
    (folder / "cpm_kernels" / "__init__.py").write_text(on_import)
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text(CPM_KERNELS.format(prepare=prepare))
    for name in ("cpm_kernels", "cpm_kernels.kernels", "cpm_kernels.kernels.base"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)


@needs_emulation
def test_cpm_kernels_launches_where_it_works(
    driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warns = "import warnings; warnings.warn('pkg_resources is deprecated')"
    install_cpm_kernels(tmp_path, monkeypatch, on_import=warns)
    backend = make_backend(driver)
    x, weight, scale, *_ = random_case(3, 40, 96, 4, torch.float16)
    backend.linear(x, weight, scale.bfloat16(), 4)
    assert "cpm_kernels" in backend.describe()["cuda:-1"]
    assert not logged(driver, "cuModuleLoadData") and not logged(driver, "cuLaunchKernel")
    calls = sys.modules["cpm_kernels.kernels.base"].calls
    assert calls == [(b"code for sm_90", "rows_int4_f16_8", (3, 1, 1), (256, 1, 1), 0, 6, [1, 3, 40, 96])]
    for name in [name for name in sys.modules if name.startswith("cpm_kernels")]:
        del sys.modules[name]


@needs_emulation
def test_cpm_kernels_that_switches_the_device_is_not_used(
    driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = f"import ctypes; ctypes.CDLL({driver._name!r}).fake_switch()"
    install_cpm_kernels(tmp_path, monkeypatch, prepare=prepare)
    backend = make_backend(driver)
    check_product(backend, 4, random_case(1, 4, 32, 4, torch.float16))
    assert "the CUDA driver" in backend.describe()["cuda:-1"]
    assert driver.fake_depth() == 0


@needs_emulation
@pytest.mark.parametrize(
    "trouble",
    [
        {"on_import": "import pkg_resources_that_is_gone"},
        {"on_import": "raise RuntimeError('CUDA Error: no CUDA-capable device is detected')"},
        {"on_import": "raise OSError('libcudart.so: cannot open shared object file')"},
        {"prepare": "raise RuntimeError('Library cudart is not initialized')"},
        {"prepare": "raise AttributeError('cuda: undefined symbol')"},
    ],
    ids=str,
)
def test_without_cpm_kernels_the_driver_launches(
    driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: dict[str, str]
) -> None:
    install_cpm_kernels(tmp_path, monkeypatch, **trouble)
    backend = make_backend(driver)
    check_product(backend, 4, random_case(1, 4, 32, 4, torch.float16))
    assert "the CUDA driver" in backend.describe()["cuda:-1"]


def test_import_does_not_touch_cpm_kernels(tmp_path: Path) -> None:
    (tmp_path / "cpm_kernels.py").write_text("raise SystemExit('cpm_kernels was imported')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import chatglm, chatglm.kernels.cuda"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


# ---- compilers and the cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "supported", "target"),
    [
        (90, [75, 80, 90, 100], "sm_90"),
        (89, [75, 80, 86], "sm_86"),
        (121, [90, 100, 120], "sm_120"),
        (120, [75, 90], "compute_90"),
        (75, [75, 80], "sm_75"),
    ],
)
def test_choice_of_target(architecture: int, supported: list[int], target: str) -> None:
    assert cuda_compile.choose_target(architecture, supported) == target


def test_a_gpu_that_is_too_old_for_the_compiler() -> None:
    with pytest.raises(KernelUnavailable, match=r"sm_75.*sm_80"):
        cuda_compile.choose_target(75, [80, 90])


def test_the_cache_is_used_and_survives_damage(fresh: None) -> None:
    compiler = FakeCompiler()

    def compile_it(source: str = "source", target: str = "sm_90") -> bytes:
        return cuda_compile.compile_cached(compiler, source, target)

    assert compile_it() == compile_it() == b"code for sm_90"
    assert compiler.targets == ["sm_90"]
    compile_it(target="sm_80")
    compile_it(source="another")
    assert compiler.targets == ["sm_90", "sm_80", "sm_90"]
    files = sorted(cache_folder().iterdir())
    assert [file.name[:11] for file in files] == ["cuda-sm_80-", "cuda-sm_90-", "cuda-sm_90-"]
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert damaged_files() == files
    assert compile_it() == b"code for sm_90"
    assert len(compiler.targets) == 4
    compiler.name = "a newer compiler"
    compile_it()
    assert len(compiler.targets) == 5


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "file" / "below"))
    compiler = FakeCompiler()
    for _ in range(2):
        assert cuda_compile.compile_cached(compiler, "source", "sm_90") == b"code for sm_90"
    assert len(compiler.targets) == 2


def test_a_failed_compilation_says_why_and_leaves_nothing(fresh: None) -> None:
    with pytest.raises(KernelUnavailable, match="no memory left"):
        cuda_compile.compile_cached(FakeCompiler("no memory left"), "source", "sm_90")
    assert not cache_folder().exists()


def test_nvrtc_is_found_beside_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    libraries = []
    for folder, name in (("cuda_nvrtc", "libnvrtc.so.12"), ("cu13", "libnvrtc.so.13"), ("cu13", "libnvrtc.alt.so.13")):
        file = tmp_path / "nvidia" / folder / "lib" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        libraries.append(file)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(cuda_compile, "toolkits", list)
    for version, expected in (("13.0", [libraries[1], libraries[0]]), ("12.8", [libraries[0], libraries[1]])):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert [file for file in cuda_compile.nvrtc_files() if tmp_path in file.parents] == expected


def test_without_any_compiler_the_reason_names_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_compile, "nvrtc_files", list)
    monkeypatch.setattr(cuda_compile, "toolkits", list)
    monkeypatch.setattr(cuda_compile, "cuda_major", lambda: 99)
    monkeypatch.setattr(cuda_compile.ctypes, "CDLL", no_library)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelUnavailable, match=r"pip install nvidia-cuda-nvrtc.*nvcc"):
        cuda_compile.find_compiler()


def no_library(name: str) -> ctypes.CDLL:
    raise OSError(f"{name}: cannot open shared object file")


def compilers() -> Sequence[Callable[[], cuda_compile.Compiler]]:
    return (
        lambda: cuda_compile.Nvrtc(cuda_compile.load_nvrtc()),
        lambda: cuda_compile.Nvcc(cuda_compile.find_nvcc()),
    )


@pytest.mark.parametrize("find", compilers(), ids=["nvrtc", "nvcc"])
def test_the_real_compilers(find: Callable[[], cuda_compile.Compiler]) -> None:
    try:
        compiler = find()
    except KernelUnavailable as reason:
        pytest.skip(str(reason))
    source = cuda.SOURCE.read_text(encoding="utf-8")
    code = compiler.compile(source, cuda_compile.choose_target(90, compiler.architectures()))
    assert code.startswith(b"\x7fELF")
    assert all(name.encode() in code for name in cuda.kernel_names(90))
    assert compiler.compile('extern "C" __global__ void f() {}', "compute_90").endswith(b"\0")
    with pytest.raises(KernelUnavailable, match="no_such_type"):
        compiler.compile("no_such_type x;", "sm_90")


# ---- load() --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hip", "cuda_version", "available", "reason"),
    [("6.0", None, True, "AMD"), (None, None, False, "without CUDA"), (None, "13.0", False, "nvidia-smi")],
)
def test_load_says_why_not(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, cuda_version: str | None, available: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    cuda.load_once.cache_clear()
    with pytest.raises(KernelUnavailable, match=reason):
        cuda.load()


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", no_library)
    with pytest.raises(KernelUnavailable, match="cannot open shared object file"):
        cuda_driver.Driver.open()


# ---- on a GPU ------------------------------------------------------------------------------------------------------

SHAPES = ((12288, 4096), (4096, 4096), (4608, 4096), (16384, 4096), (4096, 16384), (27392, 4096), (4096, 13696))


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_gpu_products_at_the_shapes_of_the_models(bits: int, dtype: torch.dtype) -> None:
    backend = cuda.load()
    for out, columns in (*SHAPES, (65024, 4096), (37, 288), (5, 70)):
        for rows in (1, 7, 8, 9, 31, 32, 33, 600):
            check_product(backend, bits, random_case(rows, out, columns, bits, dtype, DTYPES[rows % 3], "cuda"), 3e-6)


@needs_cuda
@pytest.mark.parametrize("bits", [4, 8])
def test_gpu_expansion_equals_plain_torch_bit_for_bit(bits: int) -> None:
    backend = cuda.load()
    every_byte = torch.arange(-128, 128).to(torch.int8).repeat(3, 2).cuda()
    for weight in (every_byte, every_byte[:, :263].contiguous()):
        for scale_dtype in DTYPES:
            scale = torch.tensor([0.0123, 1e-7, 60000.0]).to(scale_dtype).cuda()
            for dtype in DTYPES:
                expected = reference.dequantize(weight, scale, bits, dtype)
                assert torch.equal(backend.dequantize(weight, scale, bits, dtype), expected)


@needs_cuda
@pytest.mark.parametrize("bits", [4, 8])
def test_gpu_a_row_does_not_depend_on_the_others(bits: int) -> None:
    for dtype in DTYPES:
        x, weight, scale, *_ = random_case(32, 4096, 13696, bits, dtype, device="cuda")
        alone = cuda.load().linear(x[4:5].contiguous(), weight, scale, bits)
        for rows in (5, 9, 17, 32):
            assert torch.equal(cuda.load().linear(x[:rows], weight, scale, bits)[4:5], alone)


@needs_cuda
@pytest.mark.parametrize("first_call_in_graph", [False, True])
def test_gpu_graph(first_call_in_graph: bool) -> None:
    """Captured, then replayed with another input; also where the kernels are loaded during the capture."""
    if first_call_in_graph:
        backend = cuda.CUDABackend(cuda_driver.Driver.open(), cuda_compile.find_compiler())
    else:
        backend = cuda.load()
    x, weight, scale, *_ = random_case(1, 4096, 4096, 4, torch.float16, device="cuda")
    many = torch.randn(64, 4096, device="cuda").half()
    torch.cuda.synchronize()
    if not first_call_in_graph:
        backend.linear(many, weight, scale, 4)  # cuBLAS wants its workspace before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.linear(x, weight, scale, 4)
        z = None if first_call_in_graph else backend.linear(many, weight, scale, 4)
    x.copy_(torch.randn_like(x))
    many.copy_(torch.randn_like(many))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, cuda.load().linear(x, weight, scale, 4))
    assert z is None or torch.equal(z, cuda.load().linear(many, weight, scale, 4))


@needs_cuda
def test_gpu_streams_and_threads() -> None:
    """Each thread has a stream of its own, whose earlier work (the input) the kernel waits for."""
    backend = cuda.load()
    x, weight, scale, *_ = random_case(1, 4096, 4096, 4, torch.float16, device="cuda")
    expected = backend.linear(x, weight, scale, 4)
    torch.cuda.synchronize()
    results: list[torch.Tensor] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                late = torch.zeros_like(x)
                torch.cuda._sleep(1_000_000)
                late.copy_(x)
                results.append(backend.linear(late, weight, scale, 4))
        stream.synchronize()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    assert all(torch.equal(result, expected) for result in results)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_that_is_not_the_current_one() -> None:
    x, weight, scale, expected, _ = random_case(1, 4096, 4096, 4, torch.float16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    y = cuda.load().linear(x, weight, scale, 4)
    assert y.device == torch.device("cuda:1")
    assert (y.double() - expected).norm() <= 1e-3 * expected.norm()
    assert torch.cuda.current_device() == 0


@needs_cuda
def test_gpu_through_the_operators() -> None:
    x, weight, scale, expected, _ = random_case(6, 4096, 4096, 4, torch.float16, device="cuda")
    bias = torch.randn(4096, device="cuda").half()
    x = x.view(2, 3, 4096).requires_grad_()
    y = chatglm.kernels.linear(x, weight, scale, bias, 4)
    torch.testing.assert_close(y.double().view(6, -1), expected + bias.double(), rtol=1e-2, atol=1e-2)
    grad = torch.randn_like(y)
    y.backward(grad)
    matrix = reference.dequantize(weight, scale, 4, torch.float16)
    torch.testing.assert_close(x.grad, grad @ matrix, rtol=1e-2, atol=1e-2)
    compiled = torch.compile(lambda a: chatglm.kernels.linear(a, weight, scale, bias, 4), fullgraph=True)
    torch.testing.assert_close(compiled(x.detach()), y.detach())
