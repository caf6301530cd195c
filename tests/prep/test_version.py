"""prep.version. The three commands also run from a checkout that is not installed.

The fixture `not_installed` has the environment variables for commands in such a checkout. PYTHONPATH has two folders.
One folder has the packages and pyproject.toml. The other folder has links to all installed packages except alexnet.
`python -S` ignores site-packages.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from prep import version
from prep.store.manifest import Store
from prep.version import PACKAGES, pip_command
from tests.helpers.project import ROOT

COMMANDS = {"prep": "alexprep", "pipeline": "alexstream", "train": "alextrain"}
PROJECT_VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

Environment = dict[str, str]


@pytest.fixture(scope="module")
def not_installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    checkout, libraries = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("libraries")
    for package in COMMANDS:
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", checkout)
    for installed in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(installed).iterdir():
            if not path.name.startswith("alexnet-") and path.name not in COMMANDS and path.suffix != ".pth":
                (libraries / path.name).symlink_to(path)
    return {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{libraries}"}


def run_python(environment: Environment, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `python -S` in a folder that contains none of the packages."""
    command = [sys.executable, "-S", *map(str, words)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_environment_has_the_libraries_but_not_alexnet(not_installed: Environment, tmp_path: Path) -> None:
    script = (
        "import importlib.metadata as m, sys, numpy, prep\n"
        "try:\n    sys.exit(m.version('alexnet'))\n"
        "except m.PackageNotFoundError:\n    print(m.version('numpy'), prep.__file__)"
    )
    ended = run_python(not_installed, tmp_path, "-c", script)
    assert ended.returncode == 0, ended.stderr
    checkout = not_installed["PYTHONPATH"].split(os.pathsep)[0]
    assert ended.stdout.split()[1] == f"{checkout}/prep/__init__.py"


@pytest.mark.parametrize(("package", "command"), COMMANDS.items())
def test_python_m_runs_the_command_without_installation(
    package: str, command: str, not_installed: Environment, tmp_path: Path
) -> None:
    result = run_python(not_installed, tmp_path, "-m", package, "--version")
    assert (result.returncode, result.stdout) == (0, f"{command}, version {PROJECT_VERSION}\n"), result.stderr
    usage = run_python(not_installed, tmp_path, "-m", package, "--help")
    assert usage.stdout.startswith(f"Usage: {command} [OPTIONS] COMMAND"), usage.stderr


def test_a_store_is_built_without_installation(
    not_installed: Environment, photo_folder: Path, store: Path, tmp_path: Path
) -> None:
    """The build uses worker processes. The store equals the store that the installed program builds."""
    words = ["build-lmdb", photo_folder, "--store", tmp_path / "store", "--jobs", 2, "--json"]
    ended = run_python(not_installed, tmp_path, "-m", "prep", *words)
    assert ended.returncode == 0, ended.stderr
    assert [json.loads(line)["split"] for line in ended.stdout.splitlines()] == ["train", "val"]
    built, installed = Store.open(tmp_path / "store"), Store.open(store)
    assert built.fingerprint == installed.fingerprint
    assert built.tools == installed.tools
    assert built.tools["alexnet"] == PROJECT_VERSION


def test_a_run_describes_itself_without_installation(not_installed: Environment, store: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from train.config.recipes import SHORT\nfrom train.config.run_config import RunConfig\n"
        "from train.runs.run import Run\n"
        "run = Run.open(RunConfig(Path(sys.argv[1]), SHORT, 10, run_dir=Path('run')))\n"
        "print(run.training_facts()['environment']['alexnet'])"
    )
    ended = run_python(not_installed, tmp_path, "-c", script, store)
    assert (ended.returncode, ended.stdout) == (0, f"{PROJECT_VERSION}\n"), ended.stderr


def test_the_installed_version_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"alexnet": "7.8.9"}[name])
    version.package_version.cache_clear()
    try:
        assert version.package_version() == "7.8.9"
    finally:
        version.package_version.cache_clear()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[project]\nname = "alexnet"\nversion = "1.2.3"\n', "1.2.3"),
        (b'[project]\nname = "another"\nversion = "1.2.3"\n', "unknown"),
        (b'[project]\nname = "alexnet"\n', "unknown"),
        (b"[tool.x]\n", "unknown"),
        (b"not TOML", "unknown"),
        (b"\xff", "unknown"),
        (None, "unknown"),
    ],
)
def test_version_of_a_checkout(content: bytes | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "pyproject.toml").write_bytes(content)
    assert version.checkout_version(tmp_path) == expected


def test_hints_name_the_packages_of_the_extras_and_no_extra_of_this_project() -> None:
    """A user may have no checkout, and alexnet is not in the package index. The hint therefore names the packages."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: list(packages) for name, packages in PACKAGES.items()} == {name: extras[name] for name in PACKAGES}
    assert shlex.split(pip_command("cluster")) == ["pip", "install", "ray[default]>=2.60,<3"]
    for package in ("prep", "pipeline", "train", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            assert not re.search(r"pip install .*alexnet\[", path.read_text()), path
