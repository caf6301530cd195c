"""Several runs side by side: in what they differ, what errors they came to, and their curves in one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.console import UserError
from train.runs.run_dir import last_line, read_description, read_metrics

# What differs in every two runs, or follows from what is listed anyway.
_LEFT_OUT = ("settings.run_dir", "settings.store", "model.source", "recipe.sources", "length", "classes")
# What does not change what is learnt: in the table, not in a legend.
_NOT_LEARNT = ("settings.log_every", "settings.checkpoint_every", "settings.threads", "settings.devices", "environment")
_IN_LEGEND = 4  # fields; where more differ the folder's name says more
_CELL = 40  # characters


@dataclass(frozen=True)
class Compared:
    """One run: its fields by dotted names, and the lines of its metrics.jsonl."""

    run_dir: Path
    fields: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]


def read_runs(run_dirs: Sequence[Path]) -> list[Compared]:
    """The runs in the folders; raises UserError for fewer than two, the same twice, and a folder that is no run."""
    if len(run_dirs) < 2:
        raise UserError(f"{len(run_dirs)} run: a comparison needs two or more. Name another RUN_DIR.")
    places = [path.resolve() for path in run_dirs]
    twice = [path for k, path in enumerate(run_dirs) if places[k] in places[:k]]
    if twice:
        raise UserError(f"{twice[0]}: named twice. Name each run once.")
    runs = []
    for run_dir in run_dirs:
        about = read_description(run_dir)
        fields = _flat("", {part: value for part, value in about.items() if part != "identity"})
        fields = {name: value for name, value in fields.items() if not _among(name, _LEFT_OUT)}
        store = {"store fingerprint": about["identity"].get("store_fingerprint"), "classes": len(about["classes"])}
        runs.append(Compared(run_dir, {**store, **fields}, read_metrics(run_dir)))
    return runs


def differences(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """The fields that are not the same in all runs, with a value for each run; None where a run has no such field."""
    names = dict.fromkeys(name for run in runs for name in run.fields)
    rows = {name: [run.fields.get(name) for run in runs] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def labels_of(runs: Sequence[Compared]) -> list[str]:
    """A name for each run, by what differs: `lr 0.02, seed 1`; the folder where too much differs, or nothing does."""
    rows = {name: values for name, values in differences(runs).items() if not _among(name, _NOT_LEARNT)}
    if "model.name" in rows:  # its widths and the like follow
        rows = {name: values for name, values in rows.items() if name == "model.name" or not _among(name, ("model",))}
    if len({str(run.fields["recipe.name"]).partition(",")[0] for run in runs}) > 1:
        rows = {name: values for name, values in rows.items() if name == "recipe.name" or not _among(name, ("recipe",))}
    else:
        rows.pop("recipe.name", None)  # that of the recipe, then what is set, which has rows of its own
    folders = [str(run.run_dir) for run in runs]
    if not rows or len(rows) > _IN_LEGEND:
        return folders
    short = {name: "" if name.endswith(".name") else f"{name.rpartition('.')[2]} " for name in rows}
    labels = [
        ", ".join(short[name] + _text(name, values[k]) for name, values in rows.items()) for k in range(len(runs))
    ]
    return [f"{a}, {b}" if labels.count(a) > 1 else a for a, b in zip(labels, folders, strict=True)]


def results_of(run: Compared) -> dict[str, Any]:
    """The last lines of training and validation and the validation with the least top-1 error; None where none is."""
    validations = [line for line in run.lines if line["kind"] == "val"]
    return {
        "train": last_line(run.lines, "train"),
        "val": last_line(run.lines, "val"),
        "best": min(validations, key=lambda line: float(line["top1_error"]), default=None),
    }


def comparison_json(runs: Sequence[Compared]) -> dict[str, Any]:
    """What `alextrain compare --json` prints."""
    labels = labels_of(runs)
    return {
        "runs": [
            {"run_dir": str(r.run_dir), "label": label, **results_of(r)} for r, label in zip(runs, labels, strict=True)
        ],
        "differences": differences(runs),
    }


def comparison_lines(runs: Sequence[Compared]) -> list[str]:
    """The fields that differ and the errors as a table, a column for each run."""
    rows = [["", *(str(run.run_dir) for run in runs)]]
    rows += [[name, *(_text(name, value) for value in values)] for name, values in differences(runs).items()]
    results = [results_of(run) for run in runs]
    rows.append(["step", *(_cell(r["train"], lambda line: f"{line['step']:,}") for r in results)])
    rows.append(["training loss", *(_cell(r["train"], lambda line: f"{line['loss']:.3f}") for r in results)])
    for which, title in (("val", "last validation"), ("best", "best validation")):
        rows.append([title, *(_cell(r[which], lambda line: f"epoch {line['epoch']}") for r in results)])
        for key, name in (("top1_error", "top-1"), ("top5_error", "top-5")):
            rows.append(
                [f"  {name} error", *(_cell(r[which], lambda line, key=key: f"{line[key]:.2%}") for r in results)]
            )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def draw_comparison(runs: Sequence[Compared], out: Path) -> None:
    """Loss and top-1 error over epochs of all runs, training thin and validation with dots; PNG or SVG by the name.

    Raises UserError where matplotlib is missing, or `out` cannot be written or is of another kind.
    """
    from train.report.style import format_of, rendered, save

    save(rendered(lambda figure: _curves(figure, runs), (9, 3.6 + 0.22 * len(runs)), format_of(out)), out)


def _curves(figure: Any, runs: Sequence[Compared]) -> None:
    panels = figure.subplots(1, 2)
    for number, (run, label) in enumerate(zip(runs, labels_of(runs), strict=True)):
        colour = f"C{number}" if len(runs) <= 10 else _shade(number / (len(runs) - 1))
        shown = f" {label}" if label.startswith("_") else label  # which matplotlib would leave out
        panels[0].plot([], [], color=colour, marker="o", ms=3, lw=1.4, label=shown)  # for the legend
        for kind, style in (("train", {"lw": 0.8, "alpha": 0.4}), ("val", {"marker": "o", "ms": 3, "lw": 1.4})):
            mine = [line for line in run.lines if line["kind"] == kind]
            epochs = [line["epoch"] for line in mine]
            for axes, key, scale in zip(panels, ("loss", "top1_error"), (1, 100), strict=True):
                axes.plot(epochs, [scale * line[key] for line in mine], color=colour, **style)
    for axes, name in zip(panels, ("loss, nats", "top-1 error, %"), strict=True):
        axes.set(xlabel="epochs", ylabel=name)
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower left", alignment="left", title="training thin, validation with dots")


def _shade(share: float) -> tuple[float, float, float]:
    """More runs than there are colours that one can tell apart: from dark blue to orange, in their order."""
    return 0.1 + 0.8 * share, 0.25 + 0.3 * share, 0.55 - 0.4 * share


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """A JSON object's leaves by dotted names; a list is a leaf, an empty object none."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, part in value.items()
        for name, leaf in _flat(f"{prefix}.{key}" if prefix else key, part).items()
    }


def _among(name: str, groups: Sequence[str]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _text(name: str, value: Any) -> str:
    if name == "ancestry":
        value = ", ".join(f"{Path(one['path']).name} after step {one['step']:,}" for one in value or ()) or None
    if value is None:
        return "none"
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def _cell(line: Mapping[str, Any] | None, form: Any) -> str:
    return "none yet" if line is None else form(line)
