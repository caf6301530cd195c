"""Tests of the HTML report: valid HTML, figures that can be decoded, no external resources, layout in Chromium."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("matplotlib")

import train.report.html as report_module
from train.cli import main
from train.evaluation.evaluate import EvalResult
from train.evaluation.predictions import record_evaluation
from train.evaluation.trained_run import TrainedRun
from train.report.figures import run_figures
from train.report.html import report_page

_VOID = {"meta", "link", "img", "br"}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")


class Page(HTMLParser):
    """An HTML parser that collects elements, attributes and text, and asserts that tags are balanced."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + " "


@pytest.fixture(scope="module")
def report(small_run: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("report") / "a <run> & more"
    shutil.copytree(small_run, run_dir)
    result = CliRunner().invoke(main, ["report", str(run_dir), "--store", str(store)])
    assert result.exit_code == 0, result.output
    return run_dir / "report.html"


def test_the_report_is_valid_and_loads_nothing_from_outside(report: Path) -> None:
    source = report.read_text()
    page = Page(source)
    images = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(images) == 8 and all(image["alt"] for image in images)
    for image in images:
        kind, data = str(image["src"]).split(",")
        assert kind == "data:image/png;base64"
        assert np.asarray(Image.open(io.BytesIO(b64decode(data, validate=True))).convert("L")).std() > 5
    for _, attrs in page.elements:
        for name in ("src", "href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), attrs
    assert not re.search(r"https?:|url\(|@import|<script", source.split("<body>")[0])
    assert "<script" not in source and "a &lt;run&gt; &amp; more" in source
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} == {attrs["href"] for tag, attrs in page.elements if tag == "a"}


def test_the_report_shows_errors_recipe_store_environment_and_throughput(report: Path, store: Path) -> None:
    from train.config.recipes import SHORT

    text = " ".join(Page(report.read_text()).text.split())
    (line,) = [json.loads(line) for line in (report.parent / "evaluations.jsonl").read_text().splitlines()]
    assert line["images"] == 12
    misses = round(12 * line["top1_error"])
    assert f"{misses / 12:.2%} {misses} of 12; 95 %:" in text
    for source in SHORT.sources.values():
        assert " ".join(source.split()) in text
    description = json.loads((report.parent / "run.json").read_text())
    for fact in (
        description["store"]["fingerprint"],
        description["environment"]["torch"],
        "Images per second",
        "3, here 2",
        "16, here 10",
    ):
        assert fact in text
    assert json.loads((store / "manifest.json").read_text())["fingerprint"] == description["store"]["fingerprint"]


def test_an_imported_network_without_metrics_has_a_report_with_its_evaluations(trained_run: Path) -> None:
    (trained_run / "metrics.jsonl").unlink()
    trained = TrainedRun.open(trained_run, None, "cpu", "fp32")
    for views in (10, "dense"):
        record_evaluation(
            trained_run,
            {
                "step": trained.checkpoint.step,
                "split": "val",
                "split_fingerprint": "f",
                "views": views,
                "precision": "fp32",
            },
            EvalResult(0.5, 0.25, 1.0, 12),
        )
    names = [figure.name for figure in run_figures(trained)]
    assert names[0] == "kernels" and len(names) == 7
    page_text = Page(report_page(trained, [])).text
    for text in ("No training step was logged", "Top-1 error, ten views", "Top-1 error, dense windows"):
        assert text in page_text
    assert "op-5 error" not in page_text  # there are three classes
    parameters = sum(parameter.numel() for parameter in trained.network.parameters())
    assert f"{parameters:,} parameters for 3 classes" in page_text and "for 1000 classes" not in page_text


_HOSTILE = "</title></td><script>x</script><img src=x onerror=y>\" ' \x1b[31m\u202e\udcff"


def hostile(value: Any) -> Any:
    """Return a JSON value in which each text begins with _HOSTILE."""
    if isinstance(value, dict):
        return {key: hostile(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [hostile(part) for part in value]
    return _HOSTILE + value if isinstance(value, str) else value


def test_text_from_files_is_escaped_in_the_report(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text of run.json, the checkpoint and evaluations.jsonl has markup, control characters and a surrogate."""
    trained = TrainedRun.open(small_run, None, "cpu", "fp32")
    elements = {tag for tag, _ in Page(report_page(trained, [])).elements}
    checkpoint = replace(
        trained.checkpoint, classes=hostile(trained.checkpoint.classes), identity=hostile(trained.checkpoint.identity)
    )
    architecture = replace(trained.network.architecture, name=_HOSTILE, source=_HOSTILE)
    monkeypatch.setattr(trained.network, "architecture", architecture)
    changed = replace(trained, checkpoint=checkpoint)
    description = hostile(trained.description)
    vars(changed)["description"] = {**description, "settings": {_HOSTILE: 1, **description["settings"]}}
    line = {"step": checkpoint.step, "top1_error": 0.5, "top5_error": 0.25, "loss": 1.0, "images": 12, "views": 10}
    monkeypatch.setattr(
        report_module, "read_evaluations", lambda run_dir: [{**line, "split": _HOSTILE, "precision": _HOSTILE}]
    )
    source = report_page(changed, [])
    page = Page(source)
    assert {tag for tag, _ in page.elements} == elements and "script" not in elements
    assert source.replace("\n", "").isprintable() and source.encode()
    shown = _HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e").replace("\udcff", r"\udcff")
    assert page.text.count(shown) > 25  # the page shows the markup as text


def browser() -> str | None:
    """Return the path of Chromium, or None if there is none.

    The function looks at the variable CHROMIUM, in the folders of PATH, and in Playwright's cache.
    """
    named = [os.environ.get("CHROMIUM"), *map(shutil.which, _BROWSERS)]
    cached = Path.home().glob(".cache/ms-playwright/chromium*/*/*")
    named += [str(path) for path in cached if path.name in ("chrome", "headless_shell", "chrome-headless-shell")]
    return next((path for path in named if path), None)


# A page that shows the report in two frames, one as wide as a desktop and one as wide as a phone. The script can
# read the layout of both frames, because the frames have the same origin as the page.
_WATCH = """<!DOCTYPE html><body><script>
const frames = [];
for (const width of [1280, 390]) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 800px; border: 0`;
  frame.srcdoc = PAGE;
  frame.onload = () => {
    const page = frame.contentDocument;
    frames.push({
      width, room: page.documentElement.clientWidth, content: page.documentElement.scrollWidth,
      pictures: [...page.images].map(i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 300),
      boxes: [...page.querySelectorAll("figure, table, h1, h2, p, dl")].filter(
        b => { const r = b.getBoundingClientRect(); return r.width < 1 || r.height < 1 }).length,
      requests: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name).filter(
        name => !name.startsWith("data:")),
    });
    document.title = JSON.stringify(frames);
  };
  document.body.append(frame);
}
</script></body>"""


def test_chromium_draws_every_figure_at_desktop_and_phone_width(report: Path, tmp_path: Path) -> None:
    chromium = browser()
    if chromium is None:
        pytest.skip(
            "no Chromium: install one with `apt install chromium`, or `pip install playwright` and `playwright install "
            "chromium`; or name it in CHROMIUM"
        )
    watch = tmp_path / "watch.html"
    watch.write_text(_WATCH.replace("PAGE", json.dumps(report.read_text()).replace("</", "<\\/")))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run([*command, watch.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title is not None, done.stderr[-2000:]
    frames = json.loads(html.unescape(title[1]))
    assert sorted(frame["width"] for frame in frames) == [390, 1280]
    for frame in frames:
        assert frame["content"] <= frame["room"], "wider than the screen"
        assert frame["pictures"] == [True] * 8
        assert frame["boxes"] == 0 and frame["requests"] == []
