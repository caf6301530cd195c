"""Tests of the contents of the wheel and the source distribution, and of an installed wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from prep.compiled import library_path
from tests.fixtures import typed_program
from tests.helpers.project import ROOT

PACKAGES = ("prep", "pipeline", "train")
SOURCES = (*PACKAGES, "tools", "pyproject.toml", "README.md", "LICENSE")  # files that the build of the wheel needs


def copy_sources(folder: Path, *names: str) -> Path:
    """Copy files and folders of the checkout into `folder`.

    The build of the wheel writes compiled libraries next to the sources. The build therefore runs in a copy of the
    checkout, because other tests may load the libraries of the checkout at the same time.
    """
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(sources: Path, out: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    result = subprocess.run(
        [*command, str(sources)], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout. The copy also has files that the wheel must not contain.

    The compiler does not optimize, which halves the time.
    """
    others = ("tests", "docs", "Makefile", "CHANGELOG.md", "constraints.txt", ".gitignore")
    sources = copy_sources(tmp_path_factory.mktemp("sources"), *SOURCES, *others)
    compiler = tmp_path_factory.mktemp("compiler") / "cc"
    compiler.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
    compiler.chmod(0o700)
    return build_wheel(sources, tmp_path_factory.mktemp("wheel"), CC=str(compiler))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of a virtual environment with the wheel. This interpreter provides the dependencies."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, capture_output=True)
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site_packages)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return site_packages


def test_the_wheel_holds_every_file_of_the_three_packages_and_no_other(wheel: Path) -> None:
    """The wheel holds Python files, py.typed, C sources, and the libraries that are compiled from the C sources."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]
    expected = {path for path in files if path.suffix in (".py", ".c", ".h") or path.name == "py.typed"}
    if shutil.which("cc"):
        expected |= {library_path(path) for path in files if path.name == "kernels.c"}
    assert names == {path.relative_to(ROOT).as_posix() for path in expected}
    assert {f"{package}/py.typed" for package in PACKAGES} < names
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_without_a_compiler_the_wheel_is_for_every_machine(tmp_path: Path) -> None:
    """The build uses only the files of the source distribution."""
    wheel = build_wheel(copy_sources(tmp_path, *SOURCES), tmp_path, CC="no-such-cc")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_the_source_distribution_has_the_packages_and_no_tests(tmp_path: Path) -> None:
    (sources := tmp_path / "sources").mkdir()
    copy_sources(sources, *SOURCES, "tests", "CHANGELOG.md", "constraints.txt", ".gitignore")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path / "out")]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    (path,) = (tmp_path / "out").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/")[1] for name in archive.getnames()}
    files = {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert names == {*PACKAGES, "tools", *files}


def test_commands_run_with_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": f"{installed}:{sysconfig.get_path('purelib')}", "PATH": ""}
    for script in ("alexprep", "alexstream", "alextrain"):
        result = subprocess.run(
            [sys.executable, "-P", str(installed / "bin" / script), "--help"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=environment,
        )
        assert result.returncode == 0 and f"Usage: {script}" in result.stdout, result.stderr


@pytest.mark.soak
def test_a_users_program_has_the_types_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    """mypy --strict reads the types of an installed package only if the package contains py.typed."""
    program = Path(shutil.copy(typed_program.__file__, tmp_path / "program.py"))
    interpreter = installed.parents[2] / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache")]
    environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    result = subprocess.run(
        [*command, "--python-executable", str(interpreter), str(program)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
