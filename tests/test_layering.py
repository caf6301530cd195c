"""The import arrows of the design, read from the source, and that a --help is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"prep", "pipeline", "train", "tools", "tests"}
ALLOWED = {
    "prep": ("prep",),
    # A photograph outside of a store (pipeline/photograph.py) is prepared by what prepares those inside: prep.picture
    # and prep.rescale, which know of one picture and nothing else.
    "pipeline": (
        *("pipeline", "prep.manifest", "prep.console", "prep.compiled", "prep.datum", "prep.shard"),
        *("prep.picture", "prep.rescale"),
    ),
    "train": ("train", "pipeline", "prep.manifest", "prep.console", "prep.compiled"),
}
HEAVY = {"prep": {"torch", "nvidia"}, "pipeline": set(), "train": {"nvidia", "lmdb", "PIL"}}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function; `from prep import shard` is prep.shard."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            inside = [(ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists() for alias in node.names]
            names = zip(node.names, inside, strict=True)
            found |= {f"{node.module}.{alias.name}" if is_module else node.module for alias, is_module in names}
    return found


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_one_way(room: str) -> None:
    for path in files(room):
        for name in imports(path):
            if name.split(".")[0] in OURS:
                allowed = any(name == a or name.startswith(a + ".") for a in ALLOWED[room])
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"
            assert name.split(".")[0] not in HEAVY[room], f"{path.relative_to(ROOT)} imports {name}"


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import torch.nn as n\nfrom prep import shard\ndef f():\n    from tools.demo import demo\n"
    )
    assert imports(tmp_path / "a.py") == {"torch.nn", "prep.shard", "tools.demo"}


def test_only_placement_knows_devices() -> None:
    """`mixed`, DALI's word for decoding on a GPU, stands in one file."""
    holders = [path.name for path in files("pipeline") if '"mixed"' in path.read_text()]
    assert holders == ["placement.py"]


@pytest.mark.parametrize("room", ["prep", "pipeline", "train"])
def test_help_loads_neither_torch_nor_dali(room: str) -> None:
    script = (
        "import sys\n"
        f"from {room}.cli import main\n"
        "commands = [[], *[[name] for name in main.commands]]\n"
        "for words in commands:\n"
        "    try:\n        main([*words, '--help'])\n    except SystemExit as end:\n        assert end.code == 0\n"
        "heavy = {'torch', 'nvidia', 'numpy', 'PIL', 'sklearn', 'scipy', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy - {'numpy'} else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
