"""Shuffle quality: the number of classes in a batch, compared with the ideal number.

The ideal number is the mean over random shuffles. If the records of a store are in random order, the number of classes
in a batch is close to the ideal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.cli import main
from pipeline.diagnostics import shuffle_quality
from pipeline.diagnostics.shuffle_quality import ideal_distinct, measure_shuffle_quality
from prep.console import Progress
from prep.store.manifest import Store


@pytest.mark.parametrize(("counts", "batch"), [([5, 5, 5], 4), ([1, 1, 8], 3), ([10] * 50, 128), ([0, 7, 3], 10)])
def test_the_ideal_is_the_mean_over_random_shuffles(counts: list[int], batch: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    counts_drawn = [len(set(rng.permutation(labels)[:batch].tolist())) for _ in range(4000)]
    assert ideal_distinct(np.array(counts), batch) == pytest.approx(
        np.mean(counts_drawn), abs=4 * np.std(counts_drawn) / 63 + 1e-9
    )


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory: pytest.TempPathFactory, build: Any) -> Path:
    """A store of 40 classes with 8 small images each, in alexprep's random order."""
    source = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for label in range(40):
        (source / f"c{label:02}").mkdir()
        for k in range(8):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(source / f"c{label:02}" / f"{k}.png")
    return Path(build(source, "--side", "32"))


def inspect(store: Path, *options: str) -> tuple[dict[str, Any], str]:
    result = CliRunner().invoke(main, ["inspect", "--store", str(store), "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def test_an_epoch_is_nearly_as_well_shuffled_as_a_perfect_shuffle(many_classes: Path) -> None:
    answer, stderr = inspect(many_classes, "--batch", "32")
    assert (answer["records"], answer["steps"], answer["left_out"], answer["batches"]) == (320, 10, 0, 10)
    assert answer["share_of_ideal"] == pytest.approx(1.0, abs=0.05)
    assert "Warning" not in stderr


def test_inspect_reports_the_records_left_out(many_classes: Path) -> None:
    answer, _ = inspect(many_classes, "--batch", "19", "--world-size", "3")
    assert (answer["steps"], answer["left_out"]) == (320 // 57, 320 % 57)


def test_inspect_warns_if_records_are_in_the_order_of_their_classes(
    many_classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(many_classes)
    by_class = np.argsort(
        [record.label for record in map(shuffle_quality.Records(store, "train").__getitem__, range(320))]
    )
    monkeypatch.setattr(shuffle_quality, "epoch_permutation", lambda *_: by_class)
    quality = measure_shuffle_quality(store, "train", 32, 0, 0, 100, Progress(10, "batches"))
    assert quality.distinct_classes == 4
    assert quality.share_of_ideal == pytest.approx(4 / ideal_distinct(np.full(40, 8), 32))
    assert "perfect shuffle, expected at least 0.95" in inspect(many_classes, "--batch", "32")[1]


def test_inspect_refuses_a_batch_larger_than_the_split(many_classes: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", "--store", str(many_classes), "--batch", "321"])
    assert result.exit_code == 2
    assert "320 records in train, but a step takes 321" in result.stderr
