"""README and docs agree with the commands and the code, their links lead somewhere, and their Python blocks run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import griffe
import pytest
import torch

from pipeline.service.metrics import Metrics
from tests.helpers.project import ROOT
from tools.docs import check_site, cli_reference, draw_alexnet, griffe_extension, recipe_reference

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_readme_has_at_most_130_lines() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 130


def test_readme_lists_every_command_and_no_other() -> None:
    table = {tuple(match.split()[:2]) for match in re.findall(r"^\| `(alex\w+ [\w-]+)", README.read_text(), re.M)}
    assert table == {(name, command) for name, group in cli_reference.GROUPS.items() for command in group.commands}


def test_readme_has_only_speeds_that_the_measurements_have() -> None:
    section = re.search(r"## Speed\n(.*?)\n## ", README.read_text("utf-8"), re.S)
    measured = (ROOT / "docs" / "measurements.md").read_text("utf-8")
    assert section
    figures = re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?", re.sub(r"\]\(.*?\)", "", section[1]))
    rounded = {"1.7", "3.2"}  # these numbers are GB in README.md, and MB in measurements.md
    assert [figure for figure in figures if figure not in rounded and figure not in measured] == []


def test_commands_page_is_the_help_of_the_commands() -> None:
    assert cli_reference.PAGE.read_text("utf-8") == cli_reference.page(), "run: python -m tools.docs.cli_reference"


def test_recipes_page_has_the_numbers_of_the_code() -> None:
    assert recipe_reference.PAGE.read_text("utf-8") == recipe_reference.page(), (
        "run: python -m tools.docs.recipe_reference"
    )


def test_picture_of_the_network_is_drawn_from_the_network() -> None:
    drawn = (ROOT / "docs" / "alexnet.svg").read_text("utf-8")
    assert drawn == draw_alexnet.draw_network(), "run: python -m tools.docs.draw_alexnet docs/alexnet.svg"


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for address in re.findall(r"\]\(([^)\s]+)\)", text):
        if address.startswith("https://"):
            continue
        name, _, anchor = address.partition("#")
        target = (page.parent / name) if name else page
        assert target.is_file(), address
        if anchor and target.parent.name != "api":  # `make docs` checks the anchors of docs/api
            assert anchor in _anchors(target), address


def test_files_and_modules_of_the_project_that_are_named_exist() -> None:
    named = set()
    for page in [*ROOT.glob("*.md"), *PAGES]:
        text = page.read_text("utf-8")
        named |= set(re.findall(r"\b(?:prep|pipeline|train|tools|examples|tests)/[\w/]+\.(?:py|c)\b", text))
        named |= {f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (tools(?:\.\w+)+)", text)}
    assert named and [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def exported_metrics() -> dict[str, str]:
    """Return {name in Prometheus: type} of the metrics that a service exports.

    Ray adds `ray_` to each name, and `_total` to the name of a counter.
    """
    made = {}

    def record(kind: str) -> Any:
        def metric(name: str, text: str, tags: tuple[str, ...]) -> Any:
            made[f"ray_{name}{'_total' if kind == 'counter' else ''}"] = kind
            return SimpleNamespace(set_default_tags=lambda tags: None)

        return metric

    Metrics(SimpleNamespace(Counter=record("counter"), Gauge=record("gauge")), "name")  # type: ignore[arg-type]
    return made


def test_page_of_the_service_lists_all_metrics_with_their_types() -> None:
    page = (ROOT / "docs" / "service.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `(ray_alexstream_\w+)` \| (\w+) \|", page, re.M))
    assert listed == exported_metrics() and len(listed) >= 10


def test_dashboard_shows_all_metrics_of_the_service_and_no_other() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana-service.json").read_text("utf-8"))
    assert {panel["type"] for panel in dashboard["panels"]} == {"timeseries"}
    source = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}  # on import, Grafana asks for this data source
    assert [needed["name"] for needed in dashboard["__inputs"]] == ["DS_PROMETHEUS"]
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert all(part["datasource"] == source for part in [*dashboard["panels"], *targets])
    shown = {name for target in targets for name in re.findall(r"ray_\w+", target["expr"])}
    assert shown == exported_metrics().keys()
    (variable,) = dashboard["templating"]["list"]
    assert variable["name"] == "service" and "ray_alexstream_workers" in variable["query"]


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_python_of_the_readme_trains(store: Path) -> None:
    names = _executed(README, store, 10)
    assert names["images"].shape == (10, 3, 224, 224)
    assert names["loss"].isfinite() and names["state"]["epoch"] == 1
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["net"][-1].parameters())


def test_python_of_the_guide_to_the_stream_runs(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = _executed(ROOT / "docs" / "own-model.md", store, 10)
    assert re.search(r"epoch 2: top-1 error [\d.]+%", capsys.readouterr().out)
    assert names["images"].shape == (10, 3, 224, 224)


def test_mixup_and_cutmix_of_the_page_of_the_stream_mix_images_and_labels(store: Path) -> None:
    names = _executed(ROOT / "docs" / "stream.md", store, 10)
    assert names["images"].shape == (10, 3, 224, 224)
    assert names["targets"].sum(1).allclose(torch.ones(10))
    images, labels, count = torch.rand(4, 3, 20, 20), torch.tensor([2, 0, 1, 2]), 0
    target_of, before = torch.eye(3)[labels], [3, 0, 1, 2]
    for step in range(20):
        mixed, targets = names["mixup"](images, labels, 3, (0, 1, step))
        share = 1 - float(targets[1, 0])
        assert torch.allclose(mixed, (1 - share) * images + share * images[before], atol=1e-6)
        assert torch.allclose(targets, (1 - share) * target_of + share * target_of[before], atol=1e-6)
        cut, targets = names["cutmix"](images.clone(), labels, 3, (0, 1, step))
        changed = cut != images
        assert torch.equal(cut[changed], images[before][changed])
        assert torch.allclose(targets[1, 2], changed[1, 0].float().mean())
        rows, columns = changed[1, 0].any(1), changed[1, 0].any(0)
        assert torch.equal(changed[1, 0], rows[:, None] & columns)
        count += int(changed.any())
        assert torch.equal(names["cutmix"](images.clone(), labels, 3, (0, 1, step))[0], cut)
    assert count > 10


def _executed(page: Path, store: Path, batch: int) -> dict[str, Any]:
    """Run the Python blocks of a page in order, on `store` with a small batch.

    Returns the names that the blocks define.
    """
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    assert blocks
    for block in blocks:
        small = re.sub(r"batch_size=\d+", f"batch_size={batch}", block).replace('"store"', repr(str(store)))
        exec(compile(small, page.name, "exec"), names)
    return names


def test_site_check_finds_what_a_browser_would_load_from_a_network(tmp_path: Path) -> None:
    (tmp_path / "style.css").write_text("a { background: url(https://a.example/x.png) } b { background: url(x.png) }")
    (tmp_path / "page.html").write_text(
        '<link rel="canonical" href="https://b.example/"><link rel="stylesheet" href="//c.example/f.css">'
        '<a href="https://d.example/">a link is not loaded</a><img src="picture.png">'
        '<script src="https://e.example/s.js"></script><style>@import "https://f.example/g.css";</style>'
    )
    found = {address for _, address in check_site.remote_resources(tmp_path)}
    assert found == {f"https://{path}" for path in ("a.example/x.png", "e.example/s.js", "f.example/g.css")} | {
        "//c.example/f.css"
    }


def test_docstring_lists_in_two_columns_become_tables() -> None:
    text = griffe_extension.with_tables(
        "Reads.\n\nstore         a folder,\n              or a|b\nbatch, steps  numbers\n\nEnd."
    )
    assert text.split("\n") == [
        "Reads.",
        "",
        "",
        "| name | meaning |",
        "| --- | --- |",
        r"| `store` | a folder, or a\|b |",
        "| `batch, steps` | numbers |",
        "",
        "",
        "End.",
    ]


def test_comments_document_the_fields_of_classes() -> None:
    extensions = griffe.load_extensions(griffe_extension.ReadableDocstrings)
    with griffe.temporary_visited_module(
        'class C:\n    a: int = 1  # of the first\n    # of the\n    # second\n    b: str = "#"\n    c: int = 2\n',
        extensions=extensions,
    ) as module:
        documented = {name: module[f"C.{name}"].docstring for name in "abc"}
    assert {name: text and text.value for name, text in documented.items()} == {
        "a": "of the first",
        "b": "of the second",
        "c": None,
    }


def test_no_path_of_one_machine_is_in_the_project() -> None:
    pattern = re.compile(r"/(?:root|tmp|home)/\w")
    sources = [
        path
        for folder in ("prep", "pipeline", "train", "tools", "examples", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    for path in [*ROOT.glob("*.md"), *PAGES, *sources, ROOT / "Makefile"]:
        assert not pattern.search(path.read_text("utf-8")), path
