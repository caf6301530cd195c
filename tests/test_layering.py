"""Tests of the imports between packages and rooms, import cycles, folder sizes, and imports of large libraries.

A room is a subpackage, or a module at the top of a package.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.project import ROOT

PROJECT = {"prep", "pipeline", "train", "tools", "examples", "tests"}

# {package: packages and rooms of the project that it may import}. `pipeline` and `train` read stores, but write none.
ALLOWED = {
    "prep": ("prep",),
    # `pipeline` imports prep.images to decode and rescale single photographs exactly as builds do.
    "pipeline": (
        *("pipeline", "prep.cluster", "prep.console", "prep.schema", "prep.files", "prep.compiled"),
        "prep.version",
        *("prep.store", "prep.images.central_square", "prep.images.codec", "prep.images.jpeg", "prep.images.limits"),
        "prep.images.photograph",
    ),
    "train": (
        *("train", "pipeline", "prep.console", "prep.schema", "prep.files", "prep.compiled", "prep.plot_style"),
        "prep.version",
        *("prep.images.limits", "prep.store.agreement", "prep.store.manifest"),
    ),
}

# Rooms of each package from the lowest to the highest. A room may import itself and the rooms before it.
ROOMS = {
    "prep": (
        *("prep.console", "prep.version", "prep.compiled", "prep.schema", "prep.files", "prep.plot_style"),
        *("prep.worker_start", "prep.workers"),
        *("prep.cluster", "prep.cluster_nodes", "prep.cluster_runner"),
        *(
            "prep.store",
            "prep.images",
            "prep.inputs",
            "prep.extra",
            "prep.build",
            "prep.merge",
            "prep.check",
            "prep.remote",
            "prep.cli",
            "prep.__main__",
        ),
    ),
    "pipeline": (
        *("pipeline.settings", "pipeline.sampling", "pipeline.device", "pipeline.records", "pipeline.effects"),
        *("pipeline.augment", "pipeline.still_image", "pipeline.selection"),
        *("pipeline.engines", "pipeline.windows", "pipeline.service", "pipeline.prefetch", "pipeline.loader_base"),
        *("pipeline.evaluation_loader", "pipeline.loader"),
        *("pipeline.diagnostics", "pipeline.cli", "pipeline.__main__", "pipeline.__init__"),
    ),
    "train": (
        *("train.config", "train.formats", "train.replicas", "train.model", "train.optim", "train.runs"),
        *(
            "train.evaluation",
            "train.monitor",
            "train.trainer",
            "train.experiments",
            "train.report",
            "train.convert",
            "train.cli",
        ),
        "train.__main__",
    ),
}
# Largest number of Python files in a folder of each package.
MAX_FILES = {"prep": 12, "pipeline": 12, "train": 12, "tools": 12, "examples": 12, "tests": 14}
FORBIDDEN_LIBRARIES = {"prep": {"torch", "nvidia"}, "pipeline": set(), "train": {"nvidia", "lmdb", "PIL"}}


def module_name(path: Path, root: Path = ROOT) -> str:
    """Return the name of the module in a file, for example `prep.store` for prep/store/__init__.py."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imported_modules(path: Path) -> set[str]:
    """Return every module that a file imports: at the top, inside functions, or only for type checking.

    `from prep.store import manifest` imports prep.store.manifest.
    """
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                target = ROOT / name.replace(".", "/")
                is_module = target.with_suffix(".py").exists() or (target / "__init__.py").exists()
                modules.add(name if is_module else node.module)
    return modules


def python_files(folder: str) -> list[Path]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    return paths


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def room_index(module: str) -> int:
    """Return the position of a module's room in ROOMS. Raises AssertionError for a module that is in no room."""
    rooms = ROOMS[module.split(".")[0]]
    indices = [index for index, room in enumerate(rooms) if is_within(module, room)]
    assert indices, f"{module} is in no room of ROOMS"
    return indices[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_each_other_in_one_direction(package: str) -> None:
    for path in python_files(package):
        for module in imported_modules(path):
            top = module.split(".")[0]
            if top in PROJECT:
                allowed = any(is_within(module, part) for part in ALLOWED[package])
                assert allowed, f"{path.relative_to(ROOT)} imports {module}"
            assert top not in FORBIDDEN_LIBRARIES[package], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_lower_rooms(package: str) -> None:
    for path in python_files(package):
        importer = module_name(path)
        if importer in ("prep.__init__", "train.__init__"):
            continue
        for module in imported_modules(path):
            if module.split(".")[0] == package and module != package:
                is_lower = room_index(module) <= room_index(importer)
                assert is_lower, f"{path.relative_to(ROOT)} imports {module}, a higher room"


@pytest.mark.parametrize("package", [*ROOMS, "tools"])
def test_there_is_no_import_cycle(package: str) -> None:
    graph = {
        module_name(path): {module for module in imported_modules(path) if is_within(module, package)}
        for path in python_files(package)
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("package", MAX_FILES)
def test_no_folder_has_too_many_files(package: str) -> None:
    for folder in {path.parent for path in python_files(package)}:
        count = len(list(folder.glob("*.py")))
        assert count <= MAX_FILES[package], f"{folder.relative_to(ROOT)}: {count} Python files"


def test_examples_import_only_public_names() -> None:
    """A user who copies an example can import the same names. `from pipeline import …` imports no submodule."""
    for path in python_files("examples"):
        for module in imported_modules(path):
            is_public = module in ("pipeline", "prep.store.manifest") or is_within(module, "examples")
            assert is_public or module.split(".")[0] not in PROJECT, f"{path.relative_to(ROOT)} imports {module}"


def test_peers_of_the_benchmarks_run_without_the_packages() -> None:
    """Programs in tools/bench/peers run in other virtual environments, which lack this project's dependencies."""
    for path in python_files("tools/bench/peers"):
        project_modules = {module for module in imported_modules(path) if module.split(".")[0] in PROJECT}
        outside = [module for module in sorted(project_modules) if not is_within(module, "tools.bench.peers")]
        assert not outside, f"{path.relative_to(ROOT)} imports {outside}"


def test_imports_are_found_at_the_top_in_functions_and_for_type_checking(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import torch.nn as n\nfrom prep.store import lmdb_shard\nfrom typing import TYPE_CHECKING\n"
        "def f():\n    from tools.demo import run_demo\nif TYPE_CHECKING:\n    from prep import cli\n"
    )
    expected = {"torch.nn", "typing", "prep.store.lmdb_shard", "tools.demo", "prep.cli"}
    assert imported_modules(tmp_path / "a.py") == expected


def test_only_placement_chooses_the_decoder_of_a_gpu() -> None:
    """DALI's name for a decoder that uses a GPU is "mixed"."""
    names = [path.name for path in python_files("pipeline") if '"mixed"' in path.read_text()]
    assert names == ["device.py"]


def test_the_configuration_of_a_run_loads_no_torch() -> None:
    """--help shows choices that modules of train.config define, so these modules must load quickly."""
    modules = [name for path in python_files("train") if is_within(name := module_name(path), "train.config")]
    script = f"import sys, importlib\n[importlib.import_module(name) for name in {modules}]\n"
    script += "sys.exit('torch' in sys.modules)\n"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert len(modules) > 5 and process.returncode == 0, process.stderr


@pytest.mark.parametrize("package", ["prep", "pipeline", "train"])
def test_help_loads_neither_torch_nor_dali(package: str) -> None:
    script = (
        "import sys\n"
        f"from {package}.cli import main\n"
        "commands = [[], *[[name] for name in main.commands]]\n"
        "for words in commands:\n"
        "    try:\n        main([*words, '--help'])\n    except SystemExit as end:\n        assert end.code == 0\n"
        "heavy = {'torch', 'nvidia', 'numpy', 'PIL', 'sklearn', 'scipy', 'matplotlib', 'rich', 'ray', 'obstore'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy - {'numpy'} else 0)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
