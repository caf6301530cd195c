"""One page about a run: a single HTML file without scripts, with its pictures inside, that needs no network."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from prep.console import bytes_text, count_noun, say
from train.config.choices import INDEX_RECORDS
from train.config.recipe_table import HEADINGS, recipe_rows
from train.evaluation.evaluate import EvalResult
from train.evaluation.predictions import read_evaluations, views_text
from train.model.summary import summarize
from train.report.gallery import Plate, Trained, plates
from train.report.style import rendered, save
from train.runs.run_dir import read_metrics

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


def write_report(trained: Trained, out: Path, split: str = "val", seed: int = 0, most: int = INDEX_RECORDS) -> int:
    """Write the page; returns its bytes. Raises UserError as train.report.gallery.plates, and where it cannot be written."""
    shown = []
    for plate in plates(trained, split, seed, most):
        say(f"drawing {plate.name}")
        shown.append((plate, rendered(plate.draw, plate.size)))
    content = page(trained, shown, split).encode()
    save(content, out)
    return len(content)


def page(trained: Trained, shown: Sequence[tuple[Plate, bytes]], split: str = "val") -> str:
    """The page as HTML, of the pictures given."""
    name = trained.run_dir.resolve().name
    about = trained.state.identity
    sections = [
        ("results", "Results", _results(trained, split)),
        *((plate.name, plate.title, _figure(plate, content)) for plate, content in shown),
        ("throughput", "Throughput", _throughput(read_metrics(trained.run_dir))),
        ("network", "Network", _network(trained)),
        ("recipe", "Recipe, with its sources", _recipe(trained)),
        ("store", "Training store", _store(trained)),
        ("environment", "Environment and settings", _environment(trained)),
    ]
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{text}</section>\n' for key, title, text in sections)
    head = (
        f"{escape(about['model'])}, recipe {escape(about['recipe'])}, batch {about['batch_size']}, "
        f"seed {about['seed']}, {escape(about['precision'])}; after step {trained.state.step:,}"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(name)}: AlexNet</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(name)}</h1><p class="quiet">{head}</p><nav><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _figure(plate: Plate, content: bytes) -> str:
    data = b64encode(content).decode()
    return (
        f'<figure><div class="wide"><img src="data:image/png;base64,{data}" alt="{escape(plate.title)}"></div>'
        f"<figcaption>{escape(plate.caption)}</figcaption></figure>"
    )


def _results(trained: Trained, split: str) -> str:
    """The errors in large, and a table of all evaluations that were made of this run."""
    facts, rows = [], []
    lines = read_evaluations(trained.run_dir)
    of_now = [line for line in lines if line["step"] == trained.state.step and line["split"] == split]
    for line in of_now:
        result, views = _result(line), views_text(line["views"])
        for word, misses, interval in zip(("Top-1", "Top-5"), result.misses, result.intervals, strict=True):
            facts.append(
                (
                    f"{word} error, {views}",
                    f"{misses / result.images:.2%}",
                    f"{misses:,} of {result.images:,}; 95 %: {interval[0]:.2%} to {interval[1]:.2%}",
                )
            )
    validations = [line for line in read_metrics(trained.run_dir) if line["kind"] == "val"]
    last = next((line for line in reversed(validations) if line["step"] == trained.state.step), None)
    if not of_now and last is not None:
        facts.append(
            ("Top-1 error, centre view", f"{last['top1_error']:.2%}", f"validation after epoch {last['epoch']}")
        )
    for line in lines:
        result = _result(line)
        rows.append(
            [
                f"{line['step']:,}",
                escape(line["split"]),
                views_text(line["views"]),
                line["precision"],
                *(_rate(m, i, result.images) for m, i in zip(result.misses, result.intervals, strict=True)),
                f"{result.loss:.4f}",
            ]
        )
    heads = ("Step", "Split", "Views", "Precision", "Top-1 error", "Top-5 error", "Loss, nats")
    table = _table(heads, rows, {0, 4, 5, 6}) if rows else '<p class="quiet">Not evaluated yet: alextrain evaluate.</p>'
    return _facts(facts) + "<h3>Evaluations</h3>" + table + '<p class="quiet">Intervals: 95 %, Wilson.</p>'


def _result(line: dict[str, Any]) -> EvalResult:
    return EvalResult(line["top1_error"], line["top5_error"], line["loss"], line["images"])


def _rate(misses: int, interval: tuple[float, float], images: int) -> str:
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


def _network(trained: Trained) -> str:
    model = trained.model
    layers = summarize(len(trained.classes), model.architecture, model.recipe)
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
    return f'<p class="quiet">{escape(model.architecture.source)}</p>' + _table(heads, rows, {3, 4})


def _recipe(trained: Trained) -> str:
    recipe, rows, given = trained.model.recipe, [], trained.told.get("settings", {})
    for field, parts in recipe_rows(recipe).items():
        if field in HEADINGS:
            rows.append(f'<tr><th class="part" colspan="3">{escape(HEADINGS[field])}</th></tr>')
        for k, (name, value) in enumerate(parts):
            if name in given and str(given[name]) != value:  # --epochs, --batch
                value = f"{value}, here {given[name]}"
            source = f'<td class="source" rowspan="{len(parts)}">{escape(recipe.sources[field])}</td>' if not k else ""
            rows.append(f'<tr><th>{escape(name)}</th><td class="value">{escape(value)}</td>{source}</tr>')
    head = "<thead><tr><th>Field</th><th>Value</th><th>Source</th></tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _store(trained: Trained) -> str:
    told = trained.told["store"]
    counts = {name: split["records"] for name, split in told["splits"].items()}
    facts = [(f"Records, {name}", f"{n:,}", bytes_text(told["splits"][name]["bytes"])) for name, n in counts.items()]
    facts.append(("Classes", f"{len(trained.classes):,}", f"{trained.classes[0]} to {trained.classes[-1]}"))
    colour = told["colour"]
    pairs = {
        "fingerprint": told["fingerprint"],
        **told["settings"],
        "mean RGB": ", ".join(f"{x:.2f}" for x in colour["mean_rgb"]) + " grey levels",
        "σ of the components": ", ".join(f"{x:.2f}" for x in colour["stdevs"]) + " grey levels",
        **{f"built by {name}": number for name, number in told["tools"].items()},
    }
    return _facts(facts) + _pairs(pairs)


def _environment(trained: Trained) -> str:
    told = trained.told
    return _pairs({**told.get("environment", {}), **told.get("settings", {})})


def _facts(facts: Iterable[tuple[str, str, str]]) -> str:
    """Figures in large: name, number, note."""
    cells = (
        f"<div><dt>{escape(n)}</dt><dd>{escape(v)}<small>{escape(note)}</small></dd></div>" for n, v, note in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _pairs(pairs: dict[str, Any]) -> str:
    def rows() -> Iterator[str]:
        for name, value in pairs.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"<tr><th>{escape(name.replace('_', ' '))}</th><td><code>{escape(text)}</code></td></tr>"

    return f'<div class="wide"><table><tbody>{"".join(rows())}</tbody></table></div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[int]) -> str:
    """`numbers` are the columns that are set flush right. Cells are HTML."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        kinds = (' class="number"' if place in numbers else "" for place in range(len(texts)))
        return "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts, strict=True))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", heads)}</tr></thead><tbody>{lines}</tbody></table></div>'
