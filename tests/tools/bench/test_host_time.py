"""tools.bench.host_time measures every stage, and refuses a machine without the C kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.engines import kernels
from prep.console import UserError
from prep.store.manifest import Store
from tools.bench.host_time import host_times


@pytest.mark.skipif(kernels.native is None or kernels.native.jpeg is None, reason="no C compiler or no libjpeg")
@pytest.mark.parametrize("kind", ["jpeg", "ppm-whole"])
def test_every_stage_is_measured(stores: dict[str, Path], kind: str) -> None:
    times = host_times(Store.open(stores[kind]), batch=8, threads=2, batches=5)
    assert list(times) == ["look up", "crops", "feed", "finish", "sum"]
    assert all(0 < value < 10_000 for value in times.values())
    assert times["sum"] == pytest.approx(sum(list(times.values())[:4]))


def test_a_machine_without_the_kernel_is_refused(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "native", None)
    with pytest.raises(UserError, match="uses DALI"):
        host_times(Store.open(stores["jpeg"]), batch=8, threads=1, batches=1)
