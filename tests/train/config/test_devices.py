"""Tests of `--gpus`: parsing, the default, and the description of the columns' devices."""

from __future__ import annotations

import pytest

from train.config.devices import describe_devices, parse_devices


def test_the_default_devices_are_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, expected in ((0, ("cpu", "cpu")), (1, ("cuda:0", "cuda:0")), (8, ("cuda:0", "cuda:1"))):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert parse_devices(None) == expected
    assert parse_devices(None, columns=1) == ("cuda:0", "cuda:0")


def test_named_devices_are_parsed_in_the_given_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert parse_devices("3,1") == ("cuda:3", "cuda:1") and parse_devices("5") == ("cuda:5", "cuda:5")


def test_devices_are_described_by_column() -> None:
    assert describe_devices(("cuda:0", "cuda:0"), columns=1) == "one column on cuda:0"
    assert describe_devices(("cuda:0", "cuda:1")) == "column 0 on cuda:0, column 1 on cuda:1"
