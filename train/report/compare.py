"""Comparison of runs: the fields of run.json that differ between runs, the errors, and all learning curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.console import WrongArgument
from prep.plot_style import figure_format, render_figure
from train.report.style import plot_curve, save_figure
from train.runs.run_dir import last_line, read_description, read_metrics, shown_errors

# Fields of run.json that are not compared, because they always differ or follow from other fields.
_NOT_COMPARED = (
    *("settings.run_dir", "settings.store", "settings.store_absolute"),
    *("model.source", "recipe.sources", "length", "classes"),
)
# Fields that do not change what is learned. The table shows these fields, but the legend does not.
_NOT_IN_LEGEND = (
    "settings.log_every",
    "settings.checkpoint_every",
    "settings.threads",
    "settings.devices",
    "settings.deterministic",
    "settings.replicas",
    "settings.service",
    "settings.service_fallback",
    "environment",
)
_LEGEND_FIELDS = 4  # largest number of fields in a label; if more fields differ, the label is only the run's name
_CELL_CHARS = 40


@dataclass(frozen=True)
class ComparedRun:
    """A run to compare: the fields of its run.json by dotted names, and the lines of its metrics.jsonl."""

    run_dir: Path
    fields: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]


def read_runs(run_dirs: Sequence[Path]) -> list[ComparedRun]:
    """Read the runs in `run_dirs`. Raises UserError for fewer than two folders, a repeated folder or a missing run."""
    if len(run_dirs) < 2:
        raise WrongArgument(f"{len(run_dirs)} run: a comparison needs two or more runs. Name another RUN_DIR.")
    resolved = [path.resolve() for path in run_dirs]
    repeated = [path for k, path in enumerate(run_dirs) if resolved[k] in resolved[:k]]
    if repeated:
        raise WrongArgument(f"{repeated[0]}: named twice. Name each run once.")
    runs = []
    for run_dir in run_dirs:
        description = read_description(run_dir)
        fields = _flatten("", {part: value for part, value in description.items() if part != "identity"})
        fields = {name: value for name, value in fields.items() if not _is_in(name, _NOT_COMPARED)}
        if fields["settings.stream_seed"] is None:
            fields["settings.stream_seed"] = fields.get("settings.seed")
        store = {
            "store fingerprint": description["identity"].get("store_fingerprint"),
            "classes": len(description["classes"]),
        }
        runs.append(ComparedRun(run_dir, {**store, **fields}, read_metrics(run_dir)))
    return runs


def differing_fields(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Return the fields that are not equal in all runs.

    Each field has a list of one value for each run (None: the run lacks the field). The seed of the stream is left out
    if every run has a stream seed equal to its seed.
    """
    names = dict.fromkeys(name for run in runs for name in run.fields)
    rows = {name: [run.fields.get(name) for run in runs] for name in names}
    if rows.get("settings.stream_seed") == rows.get("settings.seed"):
        rows.pop("settings.stream_seed", None)
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def run_labels(runs: Sequence[ComparedRun]) -> list[str]:
    """Return a label for each run: its name, and the values of the fields that differ (`run-2: lr 0.02, seed 1`).

    If no field differs, or if more than _LEGEND_FIELDS fields differ, the label is only the name. Fields in
    _NOT_IN_LEGEND do not count. The name is the name of the run folder, or its path if two folders have the same name.
    """
    rows = {name: values for name, values in differing_fields(runs).items() if not _is_in(name, _NOT_IN_LEGEND)}
    if "model.name" in rows:  # the name determines all other fields of the architecture
        rows = {name: values for name, values in rows.items() if name == "model.name" or not _is_in(name, ("model",))}
    if len({str(run.fields["recipe.name"]).partition(",")[0] for run in runs}) > 1:
        rows = {name: values for name, values in rows.items() if name == "recipe.name" or not _is_in(name, ("recipe",))}
    else:
        rows.pop("recipe.name", None)  # all runs have this recipe, and its overrides have their own rows
    names = [run.run_dir.resolve().name for run in runs]
    names = [str(run.run_dir) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    if not rows or len(rows) > _LEGEND_FIELDS:
        return names
    prefixes = {name: "" if name.endswith(".name") else f"{name.rpartition('.')[2]} " for name in rows}
    labels = [
        ", ".join(prefixes[name] + _value_text(name, values[k]) for name, values in rows.items())
        for k in range(len(runs))
    ]
    return [f"{name}: {label}" for name, label in zip(names, labels, strict=True)]


def run_results(run: ComparedRun) -> dict[str, Any]:
    """Return the last training line ("train"), the last validation line ("val"), and the best validation line ("best").

    "best" has the lowest top-1 error. If a line does not exist, its value is None.
    """
    validations = [line for line in run.lines if line["kind"] == "val"]
    return {
        "train": last_line(run.lines, "train"),
        "val": last_line(run.lines, "val"),
        "best": min(validations, key=lambda line: float(line["top1_error"]), default=None),
    }


def comparison_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Return the object that `alextrain compare --json` prints, without the key "out"."""
    labels = run_labels(runs)
    return {
        "runs": [
            {"run_dir": str(run.run_dir), "label": label, **run_results(run)}
            for run, label in zip(runs, labels, strict=True)
        ],
        "differences": differing_fields(runs),
    }


def comparison_lines(runs: Sequence[ComparedRun]) -> list[str]:
    """Return a table with a column for each run.

    The rows are the fields that differ, the step, the loss and the errors.
    """
    rows = [["", *(str(run.run_dir) for run in runs)]]
    rows += [[name, *(_value_text(name, value) for value in values)] for name, values in differing_fields(runs).items()]
    results = [run_results(run) for run in runs]
    rows.append(["step", *(_cell(r["train"], "{step:,}") for r in results)])
    rows.append(["training loss", *(_cell(r["train"], "{loss:.3f}") for r in results)])
    for which, title in (("val", "last validation"), ("best", "best validation")):
        rows.append([title, *(_cell(r[which], "epoch {epoch}") for r in results)])
        for name, key in shown_errors(max(run.fields["classes"] for run in runs)):
            rows.append([f"  {name}", *(_error_cell(run, r[which], key) for run, r in zip(runs, results, strict=True))])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def draw_comparison(runs: Sequence[ComparedRun], out: Path) -> None:
    """Draw the loss and the top-1 error of all runs over the epochs.

    Training is a thin line, validation a line with dots. `out` is a .png or a .svg file. Raises UserError for another
    extension, if matplotlib is not installed, or if `out` cannot be written.
    """
    size_inches = (9, 3.6 + 0.22 * len(runs))
    format = figure_format(out, "--out")
    save_figure(render_figure(lambda figure: _draw_curves(figure, runs), size_inches, format), out)


def _draw_curves(figure: Any, runs: Sequence[ComparedRun]) -> None:
    panels = figure.subplots(1, 2)
    for number, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
        color = f"C{number}" if len(runs) <= 10 else _shade(number / (len(runs) - 1))
        shown = f" {label}" if label.startswith("_") else label  # matplotlib omits labels that begin with _
        panels[0].plot([], [], color=color, marker="o", ms=3, lw=1.4, label=shown)  # this empty curve is for the legend
        for kind, style in (("train", {"lw": 0.8, "alpha": 0.4}), ("val", {"marker": "o", "ms": 3, "lw": 1.4})):
            lines = [line for line in run.lines if line["kind"] == kind]
            epochs = [line["epoch"] for line in lines]
            for axes, key, scale in zip(panels, ("loss", "top1_error"), (1, 100), strict=True):
                single = "x" if kind == "train" else "o"
                plot_curve(axes, epochs, [scale * line[key] for line in lines], single, color=color, **style)
    for axes, name in zip(panels, ("loss, nats", "top-1 error, %"), strict=True):
        axes.set(xlabel="epochs", ylabel=name)
        axes.set_ylim(bottom=0)
    title = "thin: training (×: only one value); with dots: validation"
    figure.legend(loc="outside lower left", alignment="left", title=title)


def _shade(position: float) -> tuple[float, float, float]:
    """Return a color from dark blue (`position` 0) to orange (1), for figures of more than ten runs."""
    return 0.1 + 0.8 * position, 0.25 + 0.3 * position, 0.55 - 0.4 * position


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    """Return the leaf values of a JSON object by dotted names. A list is one leaf. An empty object has no leaves."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, part in value.items()
        for name, leaf in _flatten(f"{prefix}.{key}" if prefix else key, part).items()
    }


def _is_in(name: str, groups: Sequence[str]) -> bool:
    """Return whether a dotted name is in `groups`, or begins with a name in `groups` and a dot."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _value_text(name: str, value: Any) -> str:
    if name == "ancestry":
        value = ", ".join(f"{Path(fork['path']).name} after step {fork['step']:,}" for fork in value or ()) or None
    if value is None:
        return "none"
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= _CELL_CHARS else text[: _CELL_CHARS - 1] + "…"


def _error_cell(run: ComparedRun, line: Mapping[str, Any] | None, key: str) -> str:
    is_shown = key in (shown for _, shown in shown_errors(run.fields["classes"]))
    return _cell(line, f"{{{key}:.2%}}") if is_shown else "none"


def _cell(line: Mapping[str, Any] | None, template: str) -> str:
    return "none yet" if line is None else template.format(**line)
