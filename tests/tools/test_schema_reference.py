"""The JSON Schema documents are up to date. An independent validator and the readers refuse the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from prep.schema import parse_json
from prep.store.manifest import Store, StoreError
from tests.helpers.damaged_stores import change_manifest, sign_again
from tools.docs import schema_reference


def test_the_documents_are_current() -> None:
    advice = "run: python -m tools.docs.schema_reference"
    assert schema_reference.PAGE.read_text("utf-8") == schema_reference.page(), advice
    paths = {path.stem: path for path in schema_reference.FOLDER.glob("*.json")}
    assert set(paths) == set(schema_reference.SCHEMAS), advice
    for name, path in paths.items():
        assert path.read_text("utf-8") == schema_reference.document(name), advice


def validator(name: str) -> Draft202012Validator:
    document = json.loads(schema_reference.document(name))
    Draft202012Validator.check_schema(document)
    return Draft202012Validator(document)


def test_the_files_of_a_store_fit_the_documents(store: Path) -> None:
    for split in ("train", "val"):
        colour = parse_json((store / split / "colour.json").read_bytes(), "colour.json", "")
        assert not list(validator("colour").iter_errors(colour))
    for line in (store / "train" / "inputs.jsonl").read_bytes().splitlines():
        assert not list(validator("inputs-line").iter_errors(json.loads(line)))
    assert not list(validator("manifest").iter_errors(json.loads((store / "manifest.json").read_bytes())))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("settings", "side_px"), 5000),
        (("settings", "format"), "png"),
        (("settings", "other"), 1),
        (("classes",), []),
        (("splits", "test"), {}),
        (("splits", "train", "records"), -1),
        (("splits", "train", "shards", 0, "path"), "../x"),
        (("splits", "train", "shards", 0, "path"), "train/00000\n"),
        (("splits", "train", "moments", "total"), [1, 2]),
        (("splits", "train", "moments", "more"), 1),
        (("splits", "train", "account", "bad"), {"a": -1}),
        (("splits", "train", "account", "more"), 1),
        (("splits", "train", "fingerprint"), "0"),
        (("more",), 1),
    ],
)
def test_document_and_reader_refuse_the_same(
    store: Path, tmp_path: Path, path: tuple[str | int, ...], value: object
) -> None:
    (tmp_path / "manifest.json").write_bytes((store / "manifest.json").read_bytes())

    def change(data: Any) -> None:
        for part in path[:-1]:
            data = data[part]
        data[path[-1]] = value

    change_manifest(tmp_path, change)
    if "fingerprint" not in path and path[:2] != ("splits", "test"):
        sign_again(tmp_path)
    assert list(validator("manifest").iter_errors(json.loads((tmp_path / "manifest.json").read_bytes())))
    with pytest.raises(StoreError, match=r"manifest\.json: "):
        Store.open(tmp_path)
