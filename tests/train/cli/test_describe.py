"""Tests of the commands `summary` and `recipe`, and of the short forms of --set."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from tests.helpers.alextrain import alextrain, json_lines
from train.config.recipes import RECIPES


def test_summary_prints_the_layers_as_a_table_or_json() -> None:
    result = alextrain("summary")
    assert result.exit_code == 0 and "60,965,224" in result.stdout and "column 1 (GPU 1)" in result.stdout
    (table,) = json_lines("summary", "--classes", "10")
    assert table["parameters"] == 60_965_224 - 990 * 4097
    assert sum(row["multiply_adds"] for row in table["layers"]) == table["multiply_adds"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_prints_every_hyperparameter_with_its_source(name: str) -> None:
    result = alextrain("recipe", name)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    first = next(line for line in lines if line.startswith("  batch_size"))
    source_column = first.index(RECIPES[name].sources["batch_size"][:9])
    sources = " ".join(" ".join(line[source_column:] for line in lines).split())
    for field, source in RECIPES[name].sources.items():
        assert source in sources, field
        assert any(line.startswith((f"  {field} ", f"  {field}.")) for line in lines), field
    assert max(map(len, lines)) <= 120
    assert json_lines("recipe", name)[0]["lr"] == RECIPES[name].lr


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--no-lrn"], {"lrn": None, "within_map": None}),
        (["--no-dropout"], {"dropout": 0.0}),
        (["--no-crossing"], {"crossing": False}),
        (["--activation", "tanh"], {"activation": "tanh"}),
        (["--pool", "2"], {"pool_px": 2}),
        (["--schedule", "plateau"], {"schedule": asdict(RECIPES["paper"].schedule)}),
        (["--set", "lr=0.02", "--set", "momentum=0.8"], {"lr": 0.02, "momentum": 0.8}),
        (
            ["--no-colour"],
            {"augmentation": {**asdict(RECIPES["released"].augmentation), "colour": "off", "divisor": 1.0}},
        ),
    ],
)
def test_a_shorthand_option_for_set_changes_only_its_own_fields(options: list[str], changed: dict[str, Any]) -> None:
    before = json.loads(json.dumps(asdict(RECIPES["released"])))
    (after,) = json_lines("recipe", "released", *options)
    assert {**before, **changed} == {**after, "name": "released", "sources": before["sources"]}
    assert after["name"].startswith("released, ")
    assert {name for name in after["sources"] if "command line" in after["sources"][name]} == set(changed)


def test_the_recipe_large_prints_the_rates_of_several_batches() -> None:
    result = alextrain("recipe", "large", "--set", "lr=8")
    rates = "lr · batch / 8192: 1 at 1024, 2 at 2048, 4 at 4096, 8 at 8192"
    assert rates in result.stdout and "unproven on ImageNet" in result.stdout
    assert "lr · batch" not in alextrain("recipe", "modern").stdout
