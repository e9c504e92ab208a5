"""Lets setuptools build `paracomm._C` with CMake; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildExtension(build_ext):
    """Configures and builds in build/python-*, which later builds reuse, then installs the one file that it made."""

    def build_extension(self, ext: Extension) -> None:
        build_dir = ROOT / "build" / f"python-{sys.implementation.cache_tag}"
        target_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cmake = shutil.which("cmake") or "cmake"
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), f"-DPython_EXECUTABLE={sys.executable}"]
        configure += ["-DPARACOMM_PYTHON=ON", "-DPARACOMM_TESTS=OFF", f"-DCMAKE_BUILD_TYPE={build_type(self.debug)}"]
        # Given each time: a kept cache would hold on to an earlier choice.
        configure += [f"-DPARACOMM_CUDA={os.environ.get('PARACOMM_CUDA') or 'AUTO'}"]
        configure += [f"-Dpybind11_DIR={pybind11_dir()}", *os.environ.get("CMAKE_ARGS", "").split()]
        # Under build isolation cmake, ninja and pybind11 live in another folder each time; a kept cache names old ones.
        if ninja := shutil.which("ninja"):
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        forget_other_generator(build_dir, "Ninja" if ninja else "Unix Makefiles")
        run(configure)
        run([cmake, "--build", str(build_dir), "--parallel", str(self.parallel or os.cpu_count() or 1)])
        install = [cmake, "--install", str(build_dir), "--prefix", str(target_dir), "--component", "python"]
        run(install if self.editable_mode or self.inplace else [*install, "--strip"])


class BuildPython(build_py):
    """Drops what an earlier build left in build/lib*, so that a wheel holds no module that the sources have lost."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "paracomm", ignore_errors=True)
        super().run()


def build_type(debug: bool | None) -> str:
    return os.environ.get("PARACOMM_BUILD_TYPE") or ("RelWithDebInfo" if debug else "Release")


def pybind11_dir() -> str:
    import pybind11  # a build requirement: there only while the extension is built

    return pybind11.get_cmake_dir()


def forget_other_generator(build_dir: Path, generator: str) -> None:
    """CMake refuses to change the generator of a build folder, or to move one; start over then."""
    cache = build_dir / "CMakeCache.txt"
    if not cache.exists():
        return
    lines = cache.read_text().splitlines()
    if f"CMAKE_GENERATOR:INTERNAL={generator}" not in lines or f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}" not in lines:
        shutil.rmtree(build_dir)


def run(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} was not found; `pip install cmake ninja pybind11` provides it") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"building paracomm._C failed (exit {error.returncode}): {' '.join(command)}") from None


setup(
    ext_modules=[Extension("paracomm._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
