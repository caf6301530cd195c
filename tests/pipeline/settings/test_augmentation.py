"""Augmentation: allowed values, presets, and the augmentation in the state of a stream."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.augment import Augmentation
from pipeline.loader import eval_loader, train_loader
from prep.console import UserError, WrongArgument
from prep.store.manifest import ChannelStats


@pytest.mark.parametrize(
    "arguments",
    [
        {"mean": (1.0, 2.0)},
        {"mean": [1.0, 2.0, 3.0]},
        {"mean": (1.0, 2.0, float("nan"))},
        {"std": (1.0, 0.0, 1.0)},
        {"std": (1.0, 1.0)},
        {"size_px": 31},
        {"size_px": 224.0},
        {"window": "random resized"},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.4)},
        {"scale": (0.5, 1.1)},
        {"scale": 0.5},
        {"ratio": (0.0, 1.0)},
        {"ratio": (1.0, float("inf"))},
        {"flip": 1.5},
        {"flip": -0.1},
        {"window": "resized", "mean": "aligned"},
    ],
    ids=str,
)
def test_a_value_that_is_not_allowed_is_named(arguments: dict[str, object]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(WrongArgument, match=r"expected|Choose mean") as refused:
        replace(Augmentation(), **arguments)
    assert name in str(refused.value) and str(value) in str(refused.value) and "\n" not in str(refused.value)


def test_presets_are_the_published_settings() -> None:
    assert Augmentation.preset("alexnet") == Augmentation()
    resnet = Augmentation.preset("resnet")
    assert (resnet.window, resnet.size_px, resnet.scale, resnet.flip) == ("resized", 224, (0.08, 1.0), 0.5)
    assert resnet.ratio == pytest.approx((0.75, 1.3333333))
    assert resnet.mean == pytest.approx((123.675, 116.28, 103.53)) and resnet.std == pytest.approx(
        (58.395, 57.12, 57.375)
    )
    assert resnet.colour == "off"
    with pytest.raises(WrongArgument, match=r"resnett.*Did you mean resnet"):
        Augmentation.preset("resnett")


def test_a_state_holds_only_the_new_settings_that_are_not_default() -> None:
    """States that were saved by older versions of the code lack the new settings, and must stay valid."""
    old = {"mean": "channel", "colour": "stdev", "strength": 0.1, "divisor": 1.0, "shared_by": 1}
    assert Augmentation(eval_divisor=3.0).for_state() == old
    state = Augmentation((1.0, 2.0, 3.0), window="resized", scale=(0.2, 1.0), flip=0.0).for_state()
    assert state == old | {"mean": [1.0, 2.0, 3.0], "window": "resized", "scale": [0.2, 1.0], "flip": 0.0}
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize("changed", [{"flip": 0.2}, {"size_px": 64}, {"scale": (0.1, 1.0)}, {"std": (1.0, 1.0, 2.0)}])
def test_a_state_of_other_settings_is_refused(store: Path, changed: dict[str, object]) -> None:
    settings = Augmentation.preset("resnet")
    with (
        train_loader(store, 4, augmentation=settings) as one,
        train_loader(store, 4, augmentation=replace(settings, **changed)) as other,
        train_loader(store, 4, augmentation=settings, views=2) as twice,
    ):
        state = json.loads(json.dumps(one.state_dict()))
        one.load_state_dict(state)
        with pytest.raises(UserError, match="stream state with another augmentation"):
            other.load_state_dict(state)
        with pytest.raises(UserError, match="stream state with another views: None, this loader has 2"):
            twice.load_state_dict(state)


def test_arguments_that_do_not_fit_together_are_refused(store: Path) -> None:
    imagenet = ChannelStats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1)
    for loader in (train_loader, eval_loader):
        with pytest.raises(WrongArgument, match="normalize replaces std"):
            loader(store, 4, normalize=imagenet, augmentation=Augmentation(std=(1.0, 2.0, 3.0)))
        with pytest.raises(UserError, match=r"256 px, which is less than a crop of 300 px.*size_px of at most 256"):
            loader(store, 4, augmentation=Augmentation(size_px=300))
    for views, shared_by in ((0, 1), (2, 4)):
        with pytest.raises(WrongArgument, match=f"views {views} with augmentation.shared_by {shared_by}"):
            train_loader(store, 4, views=views, augmentation=Augmentation(shared_by=shared_by))
