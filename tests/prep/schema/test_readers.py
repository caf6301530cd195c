"""In prep, only prep.schema reads files and parses content that can be wrong. ALLOWED lists the exceptions."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.test_layering import ROOT, python_files

PARSERS = {"json.load", "json.loads", "np.load", "numpy.load", "pickle.load", "pickle.loads", "np.fromfile"}
READERS = {"read_bytes", "read_text"}

# Exceptions: {(file, call): what is read}. The content is trusted, or the code handles all errors in the content.
ALLOWED = {
    ("prep/compiled.py", "read_bytes"): "kernels.c of the installed package",
    ("prep/version.py", "read_text"): "pyproject.toml of the checkout",
    ("prep/workers.py", "read_text"): "/proc",
    ("prep/console/machine.py", "open"): "/proc",
    ("prep/files.py", "os.open"): "a folder, to sync the folder",
    ("prep/cluster_runner.py", "pickle.loads"): "results of this program's own workers in the Ray cluster",
    ("prep/inputs/folder.py", "open"): "a descriptor that was opened without blocking; the kind of the file is checked",
    ("prep/store/lmdb_shard.py", "open"): "a data.mdb that LMDB has opened before; shard_paths checks its kind",
    ("prep/cluster_nodes.py", "read_text"): "a file that this command has written a moment before",
    ("prep/inputs/formats/webdataset.py", "json.loads"): "labels of other programs may hold NaN; no error is possible",
    ("prep/inputs/formats/parquet.py", "json.loads"): "metadata of other programs may hold NaN; errors are ignored",
    ("prep/inputs/sources.py", "read_text"): "a method of ZipReader, which bounds the size",
    ("prep/inputs/formats/tiny_imagenet.py", "read_text"): "a method of ZipReader, which bounds the size",
}


def reading_calls(text: str) -> Iterator[str]:
    """Yield the calls of a module that read files or parse content, such as `np.load` or `open`."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        modes = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r"
        if name in PARSERS:
            yield name
        elif isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
            yield node.func.attr
        elif name == "open" and not set(str(mode)) & set("wxa+"):
            yield name
        elif name == "os.open" and "O_RDONLY" in ast.unparse(node) and "O_NONBLOCK" not in ast.unparse(node):
            yield name


def test_the_search_finds_all_kinds_of_reading() -> None:
    text = "json.loads(x)\nnp.load(p)\np.read_bytes()\nopen(p)\nopen(p, 'rb')\nopen(p, mode='r')\n"
    text += "os.open(p, os.O_RDONLY)\n"
    assert list(reading_calls(text)) == ["json.loads", "np.load", "read_bytes", "open", "open", "open", "os.open"]
    assert not list(reading_calls("open(p, 'wb')\nopen(p, 'a+')\nstore.open(p)\nread_regular(p, 1, '')\n"))


def test_files_are_read_only_through_prep_schema() -> None:
    found = {
        (str(path.relative_to(ROOT)), call)
        for path in python_files("prep")
        if "schema" not in path.relative_to(ROOT).parts
        for call in reading_calls(path.read_text())
    }
    assert found <= set(ALLOWED), "use read_regular, decode, read_npy or read_npz"
