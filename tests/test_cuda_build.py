"""The device source as nvcc compiles it: no warning, no stack, no spill; and what a build without nvcc says.

No GPU is needed. Where nvcc is missing these tests are skipped, and the emulated build is the only one that is tested.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")

RESOURCES = re.compile(
    r"Function properties for (?P<name>\S+)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)


def compile_for(source: Path, architecture: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """With the flags of csrc/cuda/CMakeLists.txt, and every warning an error."""
    command = ["nvcc", "-std=c++20", "-O3", "-DNDEBUG", f"-arch={architecture}", "-fmad=false"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror,-fPIC", "-Werror=all-warnings", "-Xptxas=-v"]
    command += ["-I", str(ROOT / "src"), "-I", str(ROOT / "csrc")]
    command += ["-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def check_kernels(done: subprocess.CompletedProcess[str]) -> int:
    """Fails if one needs a stack or spills; returns how many there are."""
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert "warning" not in output, output
    kernels = list(RESOURCES.finditer(output))
    for kernel in kernels:
        needs = {what: int(kernel[what]) for what in ("stack", "stores", "loads")}
        assert not any(needs.values()), f"{kernel['name']}: {needs}"
    return len(kernels)


def has_kernels(source: Path) -> bool:
    return "__global__" in source.read_text()


Job = tuple[Path, str]
QUICK = [(source, "sm_90") for source in SOURCES if has_kernels(source)]
SLOW = [(source, arch) for arch in ARCHITECTURES for source in SOURCES if (source, arch) not in QUICK
        and (has_kernels(source) or arch == "sm_90")]  # fmt: skip
Done = dict[Job, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return compile_all(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return compile_all(SLOW, tmp_path_factory.mktemp("slow"))


def compile_all(jobs: list[Job], folder: Path) -> Done:
    """On all cores: they take their time."""
    for _, architecture in jobs:
        (folder / architecture).mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(lambda job: compile_for(*job, folder / job[1]), jobs), strict=True))


def name_of(job: Job) -> str:
    return f"{job[0].stem}-{job[1]}"


@needs_nvcc
@pytest.mark.parametrize("job", QUICK, ids=name_of)
def test_no_kernel_spills(job: Job, quick: Done) -> None:
    assert check_kernels(quick[job]) > 0


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("job", SLOW, ids=name_of)
def test_no_kernel_spills_elsewhere_and_host_sides_compile(job: Job, slow: Done) -> None:
    assert (check_kernels(slow[job]) > 0) == has_kernels(job[0])


@needs_nvcc
def test_spills_would_be_noticed(tmp_path: Path) -> None:
    """A kernel whose array is indexed at run time goes to the stack."""
    source = tmp_path / "wrong.cu"
    source.write_text(
        "__global__ void wrong(int* out, int n) {\n"
        "  int values[64];\n"
        "  for (int i = 0; i < 64; ++i) values[i * n & 63] = i;\n"
        "  *out = values[n & 63];\n"
        "}\n"
    )
    with pytest.raises(AssertionError, match="stack"):
        check_kernels(compile_for(source, "sm_90", tmp_path))


# Prints a number that stands for all bits of all conversions; floats by a stride that meets every exponent and, near
# the ends of the formats, every way to round.
CONVERSIONS = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

static uint64_t sum = 14695981039346656037u;
static void note(uint32_t bits) { sum = (sum ^ bits) * 1099511628211u; }
static void note(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  note(bits);
}
int main() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    note(__half2float(__ushort_as_half(static_cast<unsigned short>(bits))));
    note(__bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits))));
  }
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 509) {
    float value;
    const auto word = static_cast<uint32_t>(bits);
    std::memcpy(&value, &word, sizeof value);
    note(uint32_t{__half_as_ushort(__float2half_rn(value))});
    note(uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(value))});
  }
  std::printf("%llx", static_cast<unsigned long long>(sum));
}
"""


@needs_nvcc
def test_emulated_conversions_have_the_bits_of_cudas_headers(tmp_path: Path) -> None:
    """NVIDIA's headers define them for the host too, with the results of the hardware."""
    source = tmp_path / "conversions.cu"
    source.write_text(CONVERSIONS)
    emulator = str(ROOT / "csrc" / "cuda" / "emulator")
    commands = {
        "cuda": ["nvcc", "-std=c++20", "-O2", "-arch=sm_90"],
        "emulated": ["g++", "-std=c++20", "-O2", "-x", "c++", "-I", emulator],
    }
    printed = {}
    for name, command in commands.items():
        program = tmp_path / name
        subprocess.run([*command, str(source), "-o", str(program)], check=True, timeout=300)
        printed[name] = subprocess.run([str(program)], check=True, capture_output=True, text=True, timeout=60).stdout
    assert printed["emulated"] == printed["cuda"]


def configure(folder: Path, *options: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDACXX"}
    command = [shutil.which("cmake") or "cmake", "-S", str(ROOT), "-B", str(folder), "-DPARACOMM_PYTHON=OFF"]
    command += ["-DPARACOMM_TESTS=OFF", *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment | ({"PATH": path} if path else {})
    )


def path_without_nvcc(folder: Path) -> str:
    """A PATH with everything that a build needs but nvcc."""
    folder.mkdir()
    for name in ("c++", "cc", "g++", "gcc", "ld", "as", "ar", "ranlib", "make", "ninja", "uname", "sh"):
        if program := shutil.which(name):
            (folder / name).symlink_to(program)
    return str(folder)


@needs_cmake
def test_asking_for_cuda_without_nvcc_is_an_error_with_its_cure(tmp_path: Path) -> None:
    done = configure(tmp_path / "build", "-DPARACOMM_CUDA=ON", path=path_without_nvcc(tmp_path / "bin"))
    if done.returncode == 0 and "CUDA compiler identification" in done.stdout:
        pytest.skip("nvcc is installed where CMake finds it without PATH")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "PARACOMM_CUDA=ON, and no nvcc that works was found" in message, done.stderr
    assert "PARACOMM_CUDA=OFF" in message


@needs_cmake
def test_a_word_that_is_no_choice_is_an_error(tmp_path: Path) -> None:
    done = configure(tmp_path / "build", "-DPARACOMM_CUDA=perhaps")
    assert done.returncode != 0
    assert "expected AUTO, ON or OFF" in " ".join(done.stderr.split())


@needs_cmake
def test_off_needs_no_nvcc(tmp_path: Path) -> None:
    path = path_without_nvcc(tmp_path / "bin")
    done = configure(tmp_path / "build", "-DPARACOMM_CUDA=OFF", path=path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_extension_says_what_it_was_built_with() -> None:
    from paracomm.build_info import build_info

    info = build_info()
    assert info["emulated_gpus"] == int(os.environ.get("PARACOMM_EMULATED_DEVICES", "8"))
    if info["cuda"] is None:
        assert info["gpus"] == 0
        assert re.search(r"PARACOMM_CUDA=OFF|nvcc was not found", info["why_no_gpu"])
    else:
        assert re.fullmatch(r"nvcc [\d.]+ for sm .+ and later", info["cuda"])
        assert info["gpus"] > 0 or info["why_no_gpu"]
