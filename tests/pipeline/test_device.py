"""Devices are given by name or as a torch.device, and DALI's outputs are bound to their GPU. CUDA is mocked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.device import Placement
from prep.console import WrongArgument


def test_the_gpu_of_a_batch_is_the_current_device_while_torch_receives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is on GPU 1, but GPU 0 is torch's current device.

    DALI takes the stream handle 0 for the default stream of the current device. The current device must therefore be
    the device of the batch.
    """
    current = [0]
    seen: dict[str, int] = {}

    @contextmanager
    def device(number: int) -> Iterator[None]:
        current.append(number)
        yield
        current.pop()

    class Output:
        def as_tensor(self) -> np.ndarray[Any, Any]:
            seen["as_tensor"] = current[-1]
            return np.ones(3, np.float32)

    def outputs(stream: str) -> tuple[Output]:
        seen["outputs"] = current[-1]
        assert stream == "the stream of 1"
        return (Output(),)

    monkeypatch.setattr("torch.cuda.device", device)
    placement = Placement(1)
    (output,) = placement.outputs(SimpleNamespace(outputs=outputs), "the stream of 1")
    assert placement.tensor_from_dali(output).tolist() == [1, 1, 1]
    assert seen == {"outputs": 1, "as_tensor": 1} and current == [0]


def test_a_device_is_a_name_or_a_torch_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 2)
    for device in ("cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)):
        assert Placement.parse(device) == Placement(None)
    for device in ("cuda:1", torch.device("cuda", 1), torch.device("cuda:1")):
        assert Placement.parse(device) == Placement(1)
    for device in ("cuda", torch.device("cuda")):
        assert Placement.parse(device) == Placement(2)  # GPU 2 is torch's current GPU
    for device in ("gpu", torch.device("meta"), "cuda:3", torch.device("cuda", 3), "cuda:x", ""):
        with pytest.raises(WrongArgument, match=f"device .?{device!s}"):
            Placement.parse(device)
