"""Fixture: the engines of a stream on a CPU."""

from __future__ import annotations

import pytest

from pipeline.engines import kernels


@pytest.fixture(params=["kernel", "python"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the C kernel, and without it.

    Without the kernel, Pillow resizes the images, and DALI or Python crops them.
    """
    if request.param == "python":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("the C kernel was not compiled")
