"""The computed tables of docs/guides/many-gpus.md are compared with values computed by hand. The page is up to date."""

from __future__ import annotations

import pytest

from tools.docs import scaling_table


def test_the_exchange_sends_twice_the_gradients_less_one_share() -> None:
    """In a ring of n GPUs, each GPU sends 2 (n − 1) / n times the bytes of the gradients.

    The gradients have 4 · 60,965,224 bytes. Each of two GPUs sends this number of bytes. Each of eight GPUs sends 1.75
    times as many.
    """
    assert scaling_table.gradient_bytes() == 243_860_896
    assert scaling_table.exchange_s(1000, 2, 500.0) == 2.0
    assert scaling_table.exchange_s(243_860_896, 8, 12.5e9) == pytest.approx(0.034141, rel=1e-4)


def test_the_time_of_a_step_follows_the_measured_times() -> None:
    """128 images take 8 ms, and 256 images 13.913 ms. The time of 16 images is on the line through these two points."""
    assert scaling_table.step_s(128) == pytest.approx(0.008)
    assert scaling_table.step_s(256) == pytest.approx(256 / 18_400)
    assert scaling_table.step_s(384) == pytest.approx((256 / 18_400 + 512 / 21_000) / 2)
    assert scaling_table.step_s(16) == pytest.approx(0.008 - 112 / 128 * (256 / 18_400 - 0.008))
    assert scaling_table.step_s(4096) == pytest.approx(4096 / 22_300)


def test_eight_gpus_compute_an_eighth_each_and_then_exchange() -> None:
    expected = 8192 / (1024 / 22_300 + 1.75 * 243_860_896 / 450e9)
    assert scaling_table.speed(8192, 8, 450e9) == pytest.approx(expected)
    assert f"{round(expected, -2):,.0f} (7.8×)" in scaling_table.tables()


def test_the_page_has_the_tables_of_today_and_says_that_they_are_computed() -> None:
    text = scaling_table.PAGE.read_text("utf-8")
    assert scaling_table.page(text) == text, "run: python -m tools.docs.scaling_table"
    assert scaling_table.tables().count("Computed, not measured") == 2
