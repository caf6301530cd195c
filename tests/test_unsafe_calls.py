"""Tests that no module of the project calls a function that can run code from the file that it reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.helpers.project import ROOT

# Modules whose functions can run code from a file, or create arbitrary objects from a file.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# {call: (argument, value)}; without this argument, the call is unsafe.
NEEDED_ARGUMENTS = {("np", "load"): ("allow_pickle", False), ("torch", "load"): ("weights_only", True)}

# Modules that may import an unsafe module, with the reason.
ALLOWED = {
    "prep/cluster_runner.py": ("pickle", "the processes of a Ray cluster trust each other (docs: threat model)"),
    "tools/bench/listing.py": ("pickle", "measures the sizes of pickles, and reads none"),
}


def unsafe_uses(source: str) -> Iterator[str]:
    """Yield the imports and calls in a Python source that can run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            yield node.func.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            module = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if (module, node.func.attr) in NEEDED_ARGUMENTS:
                name, value = NEEDED_ARGUMENTS[module, node.func.attr]
                given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                if given.get(name) is not value:
                    yield f"{module}.{node.func.attr} without {name}={value}"


@pytest.mark.parametrize("package", ["prep", "pipeline", "train", "tools"])
def test_no_module_can_run_code_from_a_file(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    names = {path: str(path.relative_to(ROOT)) for path in paths}
    found = {names[path]: uses for path in paths if (uses := list(unsafe_uses(path.read_text())))}
    assert found == {name: [ALLOWED[name][0]] for name in names.values() if name in ALLOWED}


def test_unsafe_uses_are_found() -> None:
    lines = ("import pickle", "from dill import loads", "np.load(f)", "np.load(f, allow_pickle=True)", "torch.load(f)")
    for line in (*lines, "eval(s)"):
        assert len(list(unsafe_uses(line))) == 1
    assert list(unsafe_uses("np.load(f, allow_pickle=False)\ntorch.load(f, weights_only=True)\n")) == []
