"""The wheel holds prep, pipeline, train and nothing else, and its scripts run where only the wheel is."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(ROOT),
    ]
    subprocess.run(words, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"prep", "pipeline", "train"}
    ours = {f"{room}/{path.name}" for room in ("prep", "pipeline", "train") for path in (ROOT / room).glob("*.py")}
    assert {name for name in names if ".dist-info" not in name} == ours
    assert any(name.endswith("licenses/LICENSE") for name in names)


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
