"""Tests of recipe overrides (`--set`): parsing by the type of the field, new name and sources of the recipe, errors."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest

from prep.console import UserError
from train.config.architecture import LAYERS
from train.config.overrides import COSINE, OVERRIDE_SOURCE, PLATEAU, POLYNOMIAL, apply_overrides, recipe_with_overrides
from train.config.recipe import AlexNetAugmentation, Cosine, Lrn, Plateau, Recipe, ScheduleChange, recipe_from_json
from train.config.recipes import PAPER, RECIPES, RELEASED, SHORT


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("lr=0.02", "lr", 0.02),
        ("batch_size=64", "batch_size", 64),
        ("crossing=false", "crossing", False),
        ("activation=tanh", "activation", "tanh"),
        ("pool_px=2", "pool_px", 2),
        ("lr_bias=0.02", "lr_bias", 0.02),
        ("lrn=none", "lrn", None),
        ("lrn=3,1e-3,0.5,1", "lrn", Lrn(3, 1e-3, 0.5, 1.0)),
        ("lrn.alpha=2e-5", "lrn", Lrn(5, 2e-5, 0.75, 2.0)),
        ("within_map=5,4e-5,0.75,1", "within_map", Lrn(5, 4e-5, 0.75, 1.0)),
        ("augmentation.strength=0.05", "augmentation", AlexNetAugmentation("image", "eigenvalue", 0.05)),
        ("augmentation.colour=off", "augmentation", AlexNetAugmentation("image", "off", 0.1)),
        ("init_std=0.02", "init_std", dict.fromkeys(LAYERS, 0.02)),
        ("init_std.conv3=0.03", "init_std", {**dict.fromkeys(LAYERS, 0.01), "conv3": 0.03}),
        ("init_bias=none", "init_bias", {}),
        ("init_bias.conv4=0.1", "init_bias", {**PAPER.init_bias, "conv4": 0.1}),
        ("schedule.patience_epochs=3", "schedule", Plateau(0.1, 3, 3)),
        ("schedule=cosine", "schedule", COSINE),
        ("schedule=polynomial", "schedule", POLYNOMIAL),
        ("lr_batch=128", "lr_batch", 128),
        ("lars_trust=0.001", "lars_trust", 0.001),
        ("schedule=none", "schedule", ()),
        ("schedule=steps", "schedule", (ScheduleChange(30, lr=1e-3), ScheduleChange(60, lr=1e-4))),
        (
            "schedule=25,51,79",
            "schedule",
            (ScheduleChange(25, lr=1e-3), ScheduleChange(51, lr=1e-4), ScheduleChange(79, lr=1e-5)),
        ),
        ("schedule=25:5e-3, 51:1e-4", "schedule", (ScheduleChange(25, lr=5e-3), ScheduleChange(51, lr=1e-4))),
    ],
)
def test_a_value_is_parsed_by_the_type_of_its_field(setting: str, field: str, value: object) -> None:
    changed = apply_overrides(PAPER, [setting])
    assert getattr(changed, field) == value and type(getattr(changed, field)) is type(value)
    others = {f.name for f in fields(Recipe)} - {field, "name", "sources"}
    assert all(getattr(changed, other) == getattr(PAPER, other) for other in others)
    assert OVERRIDE_SOURCE in changed.sources[field]
    assert {k: v for k, v in changed.sources.items() if k != field} == {
        k: v for k, v in PAPER.sources.items() if k != field
    }
    assert changed.name.startswith("paper, " + setting.split("=")[0])
    assert recipe_from_json(json.loads(json.dumps(asdict(changed)))) == changed


def test_overriding_a_part_keeps_the_source_of_the_other_parts() -> None:
    source = apply_overrides(PAPER, ["augmentation.strength=0.05"]).sources["augmentation"]
    assert source == f"strength {OVERRIDE_SOURCE}; else: {PAPER.sources['augmentation']}"
    assert apply_overrides(PAPER, ["lr=0.02"]).sources["lr"] == OVERRIDE_SOURCE


def test_neither_the_order_of_overrides_nor_the_notation_of_a_number_matters() -> None:
    one = apply_overrides(PAPER, ["schedule=steps", "lr=2e-2", "init_std.conv3=0.03", "init_std=0.02"])
    two = apply_overrides(PAPER, ["init_std=0.02", "lr=9", "init_std.conv3=0.03", "schedule=steps", "lr=0.02"])
    assert one == two
    assert one.name == "paper, init_std=0.02, init_std.conv3=0.03, lr=0.02, schedule=steps"
    assert one.schedule == (ScheduleChange(30, lr=2e-3), ScheduleChange(60, lr=2e-4)) and one.init_std["conv3"] == 0.03


def test_an_override_with_the_current_value_returns_the_same_recipe() -> None:
    assert apply_overrides(PAPER, ["lr=0.010", "lrn.k=2", "within_map=none", "activation=relu"]) is PAPER


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "--set lr: expected FIELD=VALUE"),
        ("lr=fast", "--set lr=fast: expected a number"),
        ("lr=nan", "--set lr=nan: expected a number"),
        ("lr=-1", "--set lr=-1: lr -1.0: expected more than 0"),
        ("batch_size=1.5", "--set batch_size=1.5: expected a whole number"),
        ("crossing=no", "--set crossing=no: expected true or false"),
        ("activation=rely", "--set activation=rely: activation 'rely': expected one of relu, tanh, sigmoid"),
        ("pool_px=4", "--set pool_px=4: pool_px 4: expected 2 or 3"),
        ("dropout=1", "dropout 1.0: expected at least 0, less than 1"),
        ("lr_bais=1", "--set lr_bais=1: there is no lr_bais. Did you mean lr_bias"),
        ("name=mine", "there is no name"),
        ("zzz=1", "Expected one of batch_size, epochs"),
        ("augmentation.strenght=1", "there is no strenght. Did you mean strength"),
        ("augmentation.colour=red", "expected one of stdev, eigenvalue, off"),
        ("init_std.conv9=1", "there is no conv9. Did you mean conv"),
        ("init_std.conv3=", "--set init_std.conv3=: expected a number"),
        ("lrn=5", "--set lrn=5: expected SIZE,ALPHA,BETA,K, or none"),
        ("lrn.size=4", "expected an odd size"),
        ("within_map.alpha=1", "--set within_map.alpha=1: the present value, none, has no part alpha"),
        ("lr.x=1", "has no part x"),
        ("lr_bias=some", "--set lr_bias=some: expected a number, or none"),
        (
            "schedule=soon",
            "--set schedule=soon: expected plateau, cosine, polynomial, steps, none, or epochs as in",
        ),
        ("schedule=51,25", "expected epochs in rising order"),
        ("schedule=nan", "expected epochs of at least 0, and learning rates of more than 0"),
        ("schedule=25:-1e-3", "learning rates of more than 0"),
        ("schedule=25:inf", "learning rates of more than 0"),
        ("schedule.drops=-1", "drops -1"),
        ("schedule.end=0.1", "there is no end"),
        ("lr_batch=0", "lr_batch 0: expected at least 1, or none"),
        ("lr_batch=1e3", "expected a whole number, or none"),
        ("lars_trust=0", "lars_trust 0.0: expected more than 0, or none"),
    ],
)
def test_errors_name_the_field_the_value_and_what_is_expected(setting: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        apply_overrides(PAPER, [setting])
    assert str(error.value).startswith("--set ") and message in str(error.value)


def test_one_item_of_the_list_of_schedule_changes_cannot_be_set() -> None:
    with pytest.raises(UserError, match="a list of changes, has no part drops"):
        apply_overrides(RELEASED, ["schedule.drops=2"])


def test_the_epochs_of_a_run_change_only_a_schedule_that_depends_on_them() -> None:
    assert recipe_with_overrides("paper", [], 5) is PAPER
    assert recipe_with_overrides("paper", ["schedule=cosine"], 5).epochs == 5
    assert recipe_with_overrides("large", [], 5).epochs == 5
    steps = recipe_with_overrides("paper", ["schedule=steps"], 30)
    assert steps.epochs == 30 and steps.schedule == (ScheduleChange(10, lr=1e-3), ScheduleChange(20, lr=1e-4))
    assert recipe_with_overrides("paper", ["schedule=25,51"], 30).epochs == 90


def test_every_recipe_is_the_same_after_a_round_trip_through_json() -> None:
    for recipe in RECIPES.values():
        assert recipe_from_json(json.loads(json.dumps(asdict(recipe)))) == recipe


def test_a_recipe_refuses_values_out_of_range() -> None:
    with pytest.raises(UserError, match="init_std"):
        replace(SHORT, init_std={"conv1": 0.1})
    with pytest.raises(UserError, match="init_bias"):
        replace(SHORT, init_bias={"conv6": 0.1})
    with pytest.raises(UserError, match="shares of lr"):
        Cosine(5, 0.0, 0.1)
    assert PLATEAU == PAPER.schedule
