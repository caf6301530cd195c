"""Which room may import which, that no import goes round in a circle, and that a --help loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.project import ROOT

OURS = {"prep", "pipeline", "train", "tools", "tests"}

# What a package may import of the others. Below these, `train` and `pipeline` know a store only as a reader does.
ALLOWED = {
    "prep": ("prep",),
    # prep.images.codec and rescale: a photograph outside of a store is prepared by what prepares those inside.
    "pipeline": (
        *("pipeline", "prep.console", "prep.files", "prep.compiled", "prep.version"),
        *("prep.store", "prep.images.central_square", "prep.images.codec", "prep.images.jpeg", "prep.images.rescale"),
    ),
    "train": (
        *("train", "pipeline", "prep.console", "prep.files", "prep.compiled", "prep.plot_style", "prep.version"),
        "prep.store.manifest",
    ),
}

# The rooms of each package from the lowest to the highest: a room imports itself and what stands before it.
ROOMS = {
    "prep": (
        *("prep.version", "prep.compiled", "prep.console", "prep.files", "prep.plot_style", "prep.workers"),
        *("prep.store", "prep.images", "prep.inputs", "prep.build", "prep.check", "prep.cli", "prep.__main__"),
    ),
    "pipeline": (
        *("pipeline.sampling", "pipeline.placement", "pipeline.records", "pipeline.augment", "pipeline.still_image"),
        *(
            "pipeline.engines",
            "pipeline.prefetch",
            "pipeline.loader_base",
            "pipeline.loader",
            "pipeline.diagnostics",
            "pipeline.cli",
        ),
        *("pipeline.__main__", "pipeline.__init__"),
    ),
    "train": (
        *(
            "train.config",
            "train.model",
            "train.optim",
            "train.runs",
            "train.evaluation",
            "train.monitor",
            "train.trainer",
        ),
        *("train.report", "train.convert", "train.cli", "train.__main__"),
    ),
}
MOST_FILES = 12  # Python files in a folder, __init__.py among them
HEAVY = {"prep": {"torch", "nvidia"}, "pipeline": set(), "train": {"nvidia", "lmdb", "PIL"}}


def module_of(path: Path, root: Path = ROOT) -> str:
    """`prep.store.manifest` for prep/store/manifest.py; `prep.store` for prep/store/__init__.py."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports: at its top, inside a function, for types alone.

    `from prep.store import manifest` is an import of prep.store.manifest.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                inside = ROOT / name.replace(".", "/")
                is_module = inside.with_suffix(".py").exists() or (inside / "__init__.py").exists()
                found.add(name if is_module else node.module)
    return found


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def is_in(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def room_of(name: str) -> int:
    """The position of a module's room in ROOMS; raises AssertionError for one that is in none."""
    rooms = ROOMS[name.split(".")[0]]
    places = [place for place, room in enumerate(rooms) if is_in(name, room)]
    assert places, f"{name} is in no room of ROOMS"
    return places[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_each_other_in_one_direction(package: str) -> None:
    for path in files(package):
        for name in imports(path):
            if name.split(".")[0] in OURS:
                allowed = any(is_in(name, place) for place in ALLOWED[package])
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"
            assert name.split(".")[0] not in HEAVY[package], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_lower_rooms(package: str) -> None:
    for path in files(package):
        module = module_of(path)
        if module in ("prep.__init__", "train.__init__"):
            continue
        for name in imports(path):
            if name.split(".")[0] == package and name != package:
                assert room_of(name) <= room_of(module), f"{path.relative_to(ROOT)} imports {name}, a higher room"


@pytest.mark.parametrize("package", ROOMS)
def test_no_module_imports_itself_through_others(package: str) -> None:
    graph = {module_of(path): {name for name in imports(path) if is_in(name, package)} for path in files(package)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("package", [*ROOMS, "tests"])
def test_no_folder_holds_more_files_than_one_can_oversee(package: str) -> None:
    for folder in {path.parent for path in files(package)}:
        count = len(list(folder.glob("*.py")))
        assert count <= MOST_FILES + 2 * (package == "tests"), f"{folder.relative_to(ROOT)}: {count} Python files"


def test_the_reader_of_imports_sees_every_kind_of_import(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import torch.nn as n\nfrom prep.store import lmdb_shard\nfrom typing import TYPE_CHECKING\n"
        "def f():\n    from tools.demo import demo\nif TYPE_CHECKING:\n    from prep import cli\n"
    )
    assert imports(tmp_path / "a.py") == {"torch.nn", "typing", "prep.store.lmdb_shard", "tools.demo", "prep.cli"}


def test_only_placement_knows_devices() -> None:
    """`mixed`, DALI's word for decoding on a GPU, occurs in one file."""
    holders = [path.name for path in files("pipeline") if '"mixed"' in path.read_text()]
    assert holders == ["placement.py"]


def test_the_settings_of_a_run_load_no_torch() -> None:
    """train.config holds the choices that --help shows, and so every module of it must be light."""
    modules = [module_of(path) for path in files("train") if is_in(module_of(path), "train.config")]
    script = f"import sys, importlib\n[importlib.import_module(name) for name in {modules}]\n"
    script += "sys.exit('torch' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert len(modules) > 5 and done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["prep", "pipeline", "train"])
def test_help_loads_neither_torch_nor_dali(package: str) -> None:
    script = (
        "import sys\n"
        f"from {package}.cli import main\n"
        "commands = [[], *[[name] for name in main.commands]]\n"
        "for words in commands:\n"
        "    try:\n        main([*words, '--help'])\n    except SystemExit as end:\n        assert end.code == 0\n"
        "heavy = {'torch', 'nvidia', 'numpy', 'PIL', 'sklearn', 'scipy', 'matplotlib', 'rich', 'ray'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy - {'numpy'} else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
