"""Tests of the counters of training steps."""

from __future__ import annotations

import math

import pytest
import torch

from train.evaluation.evaluate import top_k_misses
from train.monitor.step_counters import StepCounters


def test_counts_are_those_of_the_steps_since_the_last_read() -> None:
    rng = torch.Generator().manual_seed(3)
    counters = StepCounters(torch.device("cpu"), max_steps=3)
    for _ in range(2):  # the counters of the second interval begin at zero
        losses = torch.randn(3, generator=rng)
        scores = torch.randn(3, 8, 10, generator=rng)
        labels = torch.randint(2, 9, (3, 8), generator=rng)
        for result in zip(losses, scores, labels, strict=True):
            counters.add(*result)
        counts = counters.read()
        assert counts.losses == losses.tolist()
        assert counts.loss_sum == float(losses[0] + losses[1] + losses[2])
        assert counts.misses == tuple(top_k_misses(scores.flatten(0, 1), labels.flatten()).tolist())
        assert (counts.smallest_label, counts.largest_label) == (int(labels.min()), int(labels.max()))


def test_a_loss_that_is_not_finite_keeps_its_step() -> None:
    counters = StepCounters(torch.device("cpu"), max_steps=4)
    for loss in (1.0, math.nan, math.inf):
        counters.add(torch.tensor(loss), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    counts = counters.read()
    assert counts.losses[0] == 1.0 and math.isnan(counts.losses[1]) and counts.losses[2] == math.inf
    assert math.isnan(counts.loss_sum)


def test_more_steps_than_announced_are_refused() -> None:
    counters = StepCounters(torch.device("cpu"), max_steps=1)
    result = torch.tensor(1.0), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    for _ in range(2):
        counters.add(*result)
    with pytest.raises(IndexError, match="2 steps"):
        counters.read()
