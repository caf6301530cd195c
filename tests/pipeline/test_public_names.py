"""Public names of `pipeline`: each name is the same object as in its module and is loaded at its first use."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from tests.fixtures import typed_program


@pytest.mark.parametrize("name", pipeline.__all__)
def test_a_public_name_is_the_object_of_its_module(name: str) -> None:
    value = getattr(pipeline, name)
    assert value is getattr(importlib.import_module(pipeline._MODULES[name]), name)
    assert value.__doc__ and name in dir(pipeline)


def test_every_public_name_has_a_module_to_import_it_from() -> None:
    assert pipeline.__all__ == list(pipeline._MODULES)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'trainloader'"):
        _ = pipeline.trainloader
    with pytest.raises(ImportError):
        from pipeline import trainloader  # noqa: F401


def test_importing_the_package_loads_neither_torch_nor_dali_nor_numpy() -> None:
    script = "import sys, pipeline\nprint({'torch', 'nvidia', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_users_program_trains_on_the_stream(numbered_store: Path, tmp_path: Path) -> None:
    """The test runs tests/fixtures/typed_program.py. tests/test_wheel.py checks the types of this program."""
    assert typed_program.main(numbered_store, tmp_path / "state.json").endswith("%")
    assert typed_program.main(tmp_path, tmp_path / "state.json").startswith("store: ")
