"""The HTML report of a run: one file, readable offline, with embedded figures and without scripts."""

from __future__ import annotations

import html
import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from prep.console import bytes_text, count_noun, escaped, say
from prep.plot_style import render_figure
from train.config.architecture import ARCHITECTURES
from train.config.choices import INDEX_RECORDS
from train.config.recipe_table import HEADINGS, recipe_rows
from train.evaluation.evaluate import EvalResult
from train.evaluation.predictions import read_evaluations, views_text
from train.evaluation.trained_run import TrainedRun
from train.model.summary import size_text, summarize
from train.report.figures import RunFigure, run_figures
from train.report.style import save_figure
from train.runs.run_dir import read_metrics, shown_errors

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f21; --quiet: #61676d; --line: #dcdfe2; --page: #fdfdfc; --link: #2f5f94; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e8; --quiet: #9aa1a8; --line: #3a3f44; --page: #17191b; --link: #8ab4e8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 58rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
p { margin: .4rem 0; }
.quiet, figcaption, caption { color: var(--quiet); }
nav ul { list-style: none; margin: 1rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
a { color: var(--link); }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.4rem, 1fr)); gap: .8rem 1.5rem;
  margin: 1.4rem 0 0; }
dl.facts dt { color: var(--quiet); font-size: .85rem; }
dl.facts dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
dl.facts dd small { display: block; font-size: .8rem; color: var(--quiet); }
figure { margin: 0; }
figcaption { font-size: .9rem; margin: .3rem 0 0; }
.wide { overflow-x: auto; background: linear-gradient(90deg, var(--page) 40%, transparent) 0 / 3rem 100% local,
  linear-gradient(270deg, var(--page) 40%, transparent) 100% / 3rem 100% local,
  linear-gradient(90deg, var(--line), transparent) 0 / 1rem 100% scroll,
  linear-gradient(270deg, var(--line), transparent) 100% / 1rem 100% scroll; background-repeat: no-repeat; }
dl.facts + .wide { margin-top: 1.2rem; }
figure .wide { background: #fff; border-radius: .4rem; padding: .6rem; }
img { display: block; width: 100%; min-width: 36rem; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
th.part { padding-top: 1.2rem; font-weight: 400; font-style: italic; }
thead th { color: var(--quiet); font-weight: 400; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.value { white-space: nowrap; }
td.source { color: var(--quiet); min-width: 16rem; }
@media (max-width: 40rem) { figure .wide::before { content: "scroll sideways \\2192"; position: sticky; left: 0;
  color: #61676d; font-size: .8rem; } }
code { font: .9em ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
@media print { body { max-width: none; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


def write_report(
    trained: TrainedRun, out: Path, split: str = "val", seed: int = 0, index_records: int = INDEX_RECORDS
) -> int:
    """Write the report to `out`, and return its size in bytes.

    `split`, `seed` and `index_records` are passed to train.report.figures.run_figures. Raises the errors of
    run_figures. Also raises UserError if `out` cannot be written.
    """
    rendered = []
    for figure in run_figures(trained, split, seed, index_records):
        say(f"drawing {figure.name}")
        rendered.append((figure, render_figure(figure.draw, figure.size_inches)))
    content = report_page(trained, rendered, split).encode()
    save_figure(content, out)
    return len(content)


def report_page(trained: TrainedRun, figures: Sequence[tuple[RunFigure, bytes]], split: str = "val") -> str:
    """Return the report as HTML. `figures` are pairs of a figure and the content of its PNG file."""
    name = trained.run_dir.resolve().name
    identity = trained.checkpoint.identity
    sections = [
        ("results", "Results", _results(trained, split)),
        *((figure.name, figure.title, _figure(figure, png)) for figure, png in figures),
        ("throughput", "Throughput", _throughput(read_metrics(trained.run_dir))),
        ("network", "Network", _network(trained)),
        ("recipe", "Recipe, with its sources", _recipe(trained)),
        ("store", "Training store", _store(trained)),
        ("environment", "Environment and settings", _environment(trained)),
    ]
    links = "".join(f'<li><a href="#{key}">{_shown(title)}</a></li>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{_shown(title)}</h2>{text}</section>\n' for key, title, text in sections)
    head = (
        f"{identity['model']}, recipe {identity['recipe']}, batch {identity['batch_size']}, "
        f"seed {identity['seed']}, {identity['precision']}; after step {trained.checkpoint.step:,}"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_shown(name)}: AlexNet</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{_shown(name)}</h1><p class="quiet">{_shown(head)}</p><nav><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _figure(figure: RunFigure, png: bytes) -> str:
    data = b64encode(png).decode()
    return (
        f'<figure><div class="wide"><img src="data:image/png;base64,{data}" alt="{_shown(figure.title)}"></div>'
        f"<figcaption>{_shown(figure.caption)}</figcaption></figure>"
    )


def _results(trained: TrainedRun, split: str) -> str:
    """Return the error rates of the checkpoint in large type, and a table of all evaluations of the run."""
    facts, rows = [], []
    metrics = [name.capitalize() for name, _ in shown_errors(len(trained.classes))]
    lines = read_evaluations(trained.run_dir)
    of_checkpoint = [line for line in lines if line["step"] == trained.checkpoint.step and line["split"] == split]
    for line in of_checkpoint:
        result, views = _eval_result(line), views_text(line["views"])
        for metric, misses, interval in zip(metrics, result.misses, result.intervals, strict=False):
            facts.append(
                (
                    f"{metric}, {views}",
                    f"{misses / result.images:.2%}",
                    f"{misses:,} of {result.images:,}; 95 %: {interval[0]:.2%} to {interval[1]:.2%}",
                )
            )
    validations = [line for line in read_metrics(trained.run_dir) if line["kind"] == "val"]
    last = next((line for line in reversed(validations) if line["step"] == trained.checkpoint.step), None)
    if not of_checkpoint and last is not None:
        facts.append(
            ("Top-1 error, centre view", f"{last['top1_error']:.2%}", f"validation after epoch {last['epoch']}")
        )
    for line in lines:
        result = _eval_result(line)
        rows.append(
            [
                f"{line['step']:,}",
                line["split"],
                views_text(line["views"]),
                line["precision"],
                *(
                    _error_text(misses, interval, result.images)
                    for _, misses, interval in zip(metrics, result.misses, result.intervals, strict=False)
                ),
                f"{result.loss:.4f}",
            ]
        )
    heads = ("Step", "Split", "Views", "Precision", *metrics, "Loss, nats")
    table = (
        _table(heads, rows, {0, *range(4, len(heads))})
        if rows
        else '<p class="quiet">Not evaluated yet. To evaluate the run, use alextrain evaluate.</p>'
    )
    return _facts(facts) + "<h3>Evaluations</h3>" + table + '<p class="quiet">Intervals: 95 %, Wilson.</p>'


def _eval_result(line: dict[str, Any]) -> EvalResult:
    return EvalResult(line["top1_error"], line["top5_error"], line["loss"], line["images"])


def _error_text(misses: int, interval: tuple[float, float], images: int) -> str:
    return f"{misses / images:.2%} ({misses:,}; {interval[0]:.2%} to {interval[1]:.2%})"


def _throughput(lines: Sequence[dict[str, Any]]) -> str:
    train = [line for line in lines if line["kind"] == "train"]
    if not train:
        return '<p class="quiet">No training step was logged.</p>'
    rates = [line["images_per_s"] for line in train]
    facts = [
        ("Images per second", f"{median(rates):,.1f}", f"median; {min(rates):,.1f} to {max(rates):,.1f}"),
        (
            "Waiting for the stream",
            f"{median(line['waiting_share'] for line in train):.1%}",
            "median share of the time",
        ),
        ("Epochs", f"{train[-1]['epoch']:.2f}", count_noun(train[-1]["step"], "step")),
    ]
    return _facts(facts)


def _network(trained: TrainedRun) -> str:
    network = trained.network
    layers = summarize(len(trained.classes), network.architecture, network.recipe)
    rows = [
        [
            layer.layer,
            (f"{layer.columns} × " if layer.columns > 1 else "") + " × ".join(map(str, layer.output_per_column)),
            layer.sees,
            f"{layer.parameters:,}",
            f"{layer.multiply_adds:,}",
        ]
        for layer in layers
    ]
    total = [sum(layer.parameters for layer in layers), sum(layer.multiply_adds for layer in layers)]
    rows.append(["total", "", "", *(f"{n:,}" for n in total)])
    heads = ("Layer", "Output", "Sees", "Parameters", "Multiply-adds an image")
    # The source comes from this version of the program, not from the checkpoint. In a checkpoint of version 0.1.0, the
    # text of the source always states the number of parameters for 1000 classes.
    source = ARCHITECTURES.get(network.architecture.name, network.architecture).source
    size = size_text(layers, len(trained.classes))
    return f'<p class="quiet">{_shown(size)}. Source: {_shown(source)}</p>' + _table(heads, rows, {3, 4})


def _recipe(trained: TrainedRun) -> str:
    recipe, rows, settings = trained.network.recipe, [], trained.description.get("settings", {})
    for field, parts in recipe_rows(recipe).items():
        if field in HEADINGS:
            rows.append(f'<tr><th class="part" colspan="3">{_shown(HEADINGS[field])}</th></tr>')
        for k, (name, value) in enumerate(parts):
            if name in settings and str(settings[name]) != value:  # set by an option, such as --epochs or --batch
                value = f"{value}, here {settings[name]}"
            source = f'<td class="source" rowspan="{len(parts)}">{_shown(recipe.sources[field])}</td>' if not k else ""
            rows.append(f'<tr><th>{_shown(name)}</th><td class="value">{_shown(value)}</td>{source}</tr>')
    head = "<thead><tr><th>Field</th><th>Value</th><th>Source</th></tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _store(trained: TrainedRun) -> str:
    store = trained.description["store"]
    counts = {name: split["records"] for name, split in store["splits"].items()}
    facts = [(f"Records, {name}", f"{n:,}", bytes_text(store["splits"][name]["bytes"])) for name, n in counts.items()]
    facts.append(("Classes", f"{len(trained.classes):,}", f"{trained.classes[0]} to {trained.classes[-1]}"))
    color_stats = store["colour"]
    pairs = {
        "fingerprint": store["fingerprint"],
        **store["settings"],
        "mean RGB": ", ".join(f"{x:.2f}" for x in color_stats["mean_rgb"]) + " grey levels",
        "σ of the components": ", ".join(f"{x:.2f}" for x in color_stats["stdevs"]) + " grey levels",
        **{f"built by {name}": number for name, number in store["tools"].items()},
    }
    return _facts(facts) + _pairs(pairs)


def _environment(trained: TrainedRun) -> str:
    description = trained.description
    return _pairs({**description.get("environment", {}), **description.get("settings", {})})


def _shown(text: object) -> str:
    """Return text as HTML, with escaped markup and control characters."""
    return html.escape(escaped(str(text)))


def _facts(facts: Iterable[tuple[str, str, str]]) -> str:
    """Return HTML that shows facts in large type. Each item of `facts` is (name, value, note)."""
    cells = (
        f"<div><dt>{_shown(n)}</dt><dd>{_shown(v)}<small>{_shown(note)}</small></dd></div>" for n, v, note in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _pairs(pairs: dict[str, Any]) -> str:
    def rows() -> Iterator[str]:
        for name, value in pairs.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"<tr><th>{_shown(name.replace('_', ' '))}</th><td><code>{_shown(text)}</code></td></tr>"

    return f'<div class="wide"><table><tbody>{"".join(rows())}</tbody></table></div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[int]) -> str:
    """Return a table of texts. `numbers` are the indices of the columns that are aligned right."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        classes = (' class="number"' if column in numbers else "" for column in range(len(texts)))
        return "".join(f"<{tag}{class_}>{_shown(text)}</{tag}>" for class_, text in zip(classes, texts, strict=True))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", heads)}</tr></thead><tbody>{lines}</tbody></table></div>'
