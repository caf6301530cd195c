"""The device that decodes and augments the images: a CPU or a GPU.

This module imports DALI, chooses the devices of DALI's operators, and converts DALI's outputs to torch.

Each DALI graph is written once for both devices. A Placement determines the device of each operator, and the decoder of
JPEG files.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from prep.console import UserError, WrongArgument
from prep.version import pip_command

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Placement:
    """The device on which the stream decodes and augments. `device_id` is the index of the GPU; None for the CPU."""

    device_id: int | None

    @staticmethod
    def parse(device: str | torch.device) -> Placement:
        """Return the placement for `cpu`, `cuda` or `cuda:N`, as a string or a torch.device.

        `cuda` is torch's current GPU. Raises WrongArgument for another kind of device, and for a GPU that this machine
        lacks.
        """
        match = re.fullmatch(r"(cpu)(?::0)?|cuda(?::(\d+))?", str(device))
        if match is None:
            raise WrongArgument(f"device {str(device)!r}: expected cpu or cuda:N.")
        if match[1]:
            return Placement(None)
        import torch

        count = torch.cuda.device_count()
        index = int(match[2]) if match[2] else torch.cuda.current_device() if count else 0
        if index >= count:
            raise WrongArgument(
                f"device {device}: torch finds {count} GPUs on this machine. Choose cpu or one of these GPUs."
            )
        return Placement(index)

    @property
    def decoder_device(self) -> str:
        """The `device` argument of DALI's image decoder.

        "mixed" means that the input is on the CPU and the output on the GPU.
        """
        return "cpu" if self.device_id is None else "mixed"

    def constant(self, types: Any, values: Any, layout: str | None = None) -> Any:
        """Return an array as a DALI constant on the operators' device."""
        return types.Constant(values, device="cpu" if self.device_id is None else "gpu", layout=layout)

    def to_device(self, node: Any) -> Any:
        """Move a DALI node from the CPU to the operators' device."""
        return node if self.device_id is None else node.gpu()

    def outputs(self, pipe: Any, stream: Any) -> tuple[Any, ...]:
        """Return the next outputs of a DALI pipeline. `stream` is a torch.cuda.Stream, or None on a CPU.

        On a GPU the outputs are bound to `stream`: work that is launched on this stream afterwards waits on the GPU
        until DALI is done. The host does not wait. When the outputs are released, DALI reuses their memory only after
        the work that was launched on `stream` before the release.
        """
        with self._current_device():
            outputs: tuple[Any, ...] = pipe.outputs() if stream is None else pipe.outputs(stream)
        return outputs

    def tensor_from_dali(self, output: Any) -> Any:
        """Convert an output of DALI to a torch tensor that shares the output's memory.

        On a GPU, torch's current stream must be the stream that was passed to the method `outputs`.
        """
        from torch.utils.dlpack import from_dlpack

        with self._current_device():
            return from_dlpack(output.as_tensor())

    def _current_device(self) -> AbstractContextManager[object]:
        """Make the placement's GPU the current CUDA device within a `with` block.

        This is needed because the handle of torch's default stream is 0, and DALI interprets 0 as the default stream of
        the current GPU. If another GPU were current, DALI would synchronize with the wrong stream and could release
        memory too early.
        """
        if self.device_id is None:
            return nullcontext()
        import torch

        return torch.cuda.device(self.device_id)


def dali() -> ModuleType:
    """Return the module nvidia.dali. If DALI is missing, raises UserError with the command that installs it."""
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.tensors
        import nvidia.dali.types
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("nvidia"):
            raise
        raise UserError(
            f"NVIDIA DALI is not installed. Install DALI with: {pip_command('cuda13')} (for CUDA 12: "
            f"{pip_command('cuda12')}; both run on the CPU too). The package nvidia-dali is only a placeholder: "
            "installing it fails."
        ) from None
    module: ModuleType = nvidia.dali
    return module
