"""Fixture `engine`: a test runs with the C kernel, and once more without it."""

from __future__ import annotations

import pytest

from pipeline.engines import kernels


@pytest.fixture(params=["kernel", "python"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the C kernel, Pillow resizes the images, and DALI or Python crops them."""
    if request.param == "python":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("the C kernel was not compiled")
