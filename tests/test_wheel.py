"""The wheel holds prep, pipeline, train and nothing else, and its scripts run where only the wheel is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from prep.compiled import library_path

ROOT = Path(__file__).parent.parent


NEEDED = ("prep", "pipeline", "train", "tools", "pyproject.toml", "README.md", "LICENSE")  # to make a wheel


def copied(folder: Path, *names: str) -> Path:
    """Building compiles beside the source, where other tests may be loading what is there: so it is done in a copy."""
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(sources: Path, out: Path, **environment: str) -> Path:
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    done = subprocess.run(
        [*words, str(sources)], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    others = ("tests", "docs", "Makefile", "CHANGELOG.md", "constraints.txt", ".gitignore")
    return build_wheel(copied(tmp_path_factory.mktemp("sources"), *NEEDED, *others), tmp_path_factory.mktemp("wheel"))


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"prep", "pipeline", "train"}
    ours = {f"{room}/{path.name}" for room in ("prep", "pipeline", "train") for path in (ROOT / room).glob("*.py")}
    sources = list(ROOT.glob("*/*/kernels.c"))
    libraries = [library_path(source) for source in sources] if shutil.which("cc") else []
    native = {f"{path.parent.name}/{path.name}" for path in sources + libraries}
    assert {name for name in names if ".dist-info" not in name} == ours | native
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_without_a_compiler_the_wheel_is_for_every_machine(tmp_path: Path) -> None:
    """What is in the source distribution is enough to make it."""
    wheel = build_wheel(copied(tmp_path, *NEEDED), tmp_path, CC="no-such-cc")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_scripts_run_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(words, check=True, capture_output=True)
    environment = {"PYTHONPATH": f"{target}:{sysconfig.get_path('purelib')}", "PATH": ""}
    for script, heading in (("alexprep", "Photographs"), ("alexstream", "stream"), ("alextrain", "two-column")):
        done = subprocess.run(
            [sys.executable, "-P", str(target / "bin" / script), "--help"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 0 and heading in done.stdout, done.stderr
