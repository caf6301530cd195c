"""Writes the JSON Schema documents in docs/schemas and the page docs/schemas.md, from the typed models of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from msgspec import inspect
from msgspec import json as msgspec_json

from prep.store.models import ColorStats, Manifest, Outcome
from prep.store.work_files import MergeFile, PartsFile, PlanFile, Summary
from train.formats.checkpoint_file import CheckpointFile
from train.formats.lines import EvaluationLine, TrainLine, ValLine
from train.formats.run_file import RunFile
from train.formats.small_files import AblationFile, EnsembleFile, PredictionsAbout, StatusFile

PAGE = Path(__file__).parents[2] / "docs" / "schemas.md"
FOLDER = PAGE.with_suffix("")

# name of the document -> (model, file that the document describes)
SCHEMAS: dict[str, tuple[Any, str]] = {
    "manifest": (Manifest, "`manifest.json` of a store"),
    "colour": (ColorStats, "`colour.json` of a split"),
    "inputs-line": (Outcome, "one line of `inputs.jsonl` of a split"),
    "plan": (PlanFile, "`.build/plan.json` of an unfinished build"),
    "shard-summary": (Summary, "`.build/NNNNN.json`, the summary of a finished shard"),
    "parts": (PartsFile, "`.build/parts.json` of a build in parts"),
    "merge": (MergeFile, "`.build/merge.json` of an unfinished merge"),
    "run": (RunFile, "`run.json` of a run"),
    "status": (StatusFile, "`status.json` of a run"),
    "metrics-train-line": (TrainLine, "one line of `metrics.jsonl` of a run, with the kind `train`"),
    "metrics-val-line": (ValLine, "one line of `metrics.jsonl` of a run, with the kind `val`"),
    "evaluations-line": (EvaluationLine, "one line of `evaluations.jsonl` of a run"),
    "ensemble": (EnsembleFile, "`ensemble.json` of an ensemble"),
    "ablation": (AblationFile, "`ablation.json` of a run of `alextrain ablate`"),
    "predictions-about": (PredictionsAbout, "the text `about` in a `.npz` file of class probabilities"),
    "checkpoint": (CheckpointFile, "the values of a checkpoint, except tensors"),
}

_TEXT = """# JSON Schema documents

The documents in the table describe the JSON files that the programs read, in [JSON Schema](https://json-schema.org)
2020-12. The documents are generated from typed models in the code. When a program reads a file, it first compares the
whole file with its model.

A document gives the type and the bounds of each field. A file must also follow rules that JSON Schema cannot express.
For example, some counts must add up to another field. [Store format](store-format.md) describes these rules.

All files must be UTF-8 without byte order mark. The programs refuse NaN, infinite numbers, an object that has the same
key twice, and more than 64 levels of nested objects and arrays. If an object must not have unknown fields, its
`additionalProperties` is `false`. In all other objects, unknown fields are ignored.

| document | file |
| --- | --- |
"""


def page() -> str:
    """Return the text of docs/schemas.md."""
    return _TEXT + "".join(f"| [{name}.json](schemas/{name}.json) | {what} |\n" for name, (_, what) in SCHEMAS.items())


def document(name: str) -> str:
    """Return the JSON Schema document `name`."""
    model, what = SCHEMAS[name]
    schema = msgspec_json.schema(model)
    for strict in _strict_names(inspect.type_info(model), set()):
        schema["$defs"][strict]["additionalProperties"] = False
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": what.replace("`", "")}
    return json.dumps(head | schema, indent=1) + "\n"


def _strict_names(node: Any, seen: set[int]) -> set[str]:
    """Return the names of the dataclasses and TypedDicts of a model that refuse unknown fields."""
    names: set[str] = set()
    if type(node).__name__ == "Metadata" and (node.extra or {}).get("refuses_unknown"):
        names.add(node.type.cls.__name__)
    if getattr(getattr(node, "cls", None), "refuses_unknown", False):
        names.add(node.cls.__name__)
    if id(node) in seen:
        return names
    seen.add(id(node))
    below = [getattr(node, part, None) for part in ("type", "item_type", "value_type")]
    below += [*getattr(node, "types", ()), *getattr(node, "item_types", ())]
    below += [field.type for field in getattr(node, "fields", ())]
    return names.union(*(_strict_names(part, seen) for part in below if isinstance(part, inspect.Type)))


@click.command()
def main() -> None:
    """Write docs/schemas.md and the documents in docs/schemas."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name in SCHEMAS:
        (FOLDER / f"{name}.json").write_text(document(name), "utf-8")
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
