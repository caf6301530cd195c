"""CPU or GPU: the only file that knows the difference.

Every graph is written once. A Placement says which device an operator has, how encoded pictures are decoded, and
on which of torch's streams a finished batch is handed over.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from prep.console import UserError


@dataclass(frozen=True)
class Placement:
    """Where a graph runs. `device_id` is None on the CPU, which needs no driver."""

    device_id: int | None

    @staticmethod
    def parse(device: str) -> Placement:
        """`cpu`, `cuda` or `cuda:N`; raises UserError for other words and for a GPU that is not there."""
        if device == "cpu":
            return Placement(None)
        match = re.fullmatch(r"cuda(?::(\d+))?", device)
        if match is None:
            raise UserError(f"device {device!r}: expected cpu or cuda:N.")
        import torch

        wanted, there = int(match[1] or 0), torch.cuda.device_count()
        if wanted >= there:
            raise UserError(f"device {device}: this machine shows {there} GPUs. Name cpu, or a GPU that is there.")
        return Placement(wanted)

    @property
    def decoder_device(self) -> str:
        """DALI's device word for a decoder: its input is always on the CPU."""
        return "cpu" if self.device_id is None else "mixed"

    def constant(self, types: Any, values: Any, layout: str | None = None) -> Any:
        """An array as a DALI node that already lies where the operators are."""
        return types.Constant(values, device="cpu" if self.device_id is None else "gpu", layout=layout)

    def schedule(self, pipe: Any) -> None:
        """Have a pipeline work on what it was fed with."""
        pipe.schedule_run()

    def outputs(self, pipe: Any) -> tuple[Any, ...]:
        """A pipeline's next outputs; on a GPU bound to torch's present stream, so that neither side waits for the host
        and DALI does not reuse their memory before torch has done with it."""
        if self.device_id is None:
            outputs: tuple[Any, ...] = pipe.outputs()
        else:
            import torch

            with self._current():
                outputs = pipe.outputs(torch.cuda.current_stream(self.device_id))
        return outputs

    def tensor_from_dali(self, output: Any) -> Any:
        """One of `outputs` as a torch tensor on the same memory."""
        from torch.utils.dlpack import from_dlpack

        with self._current():
            return from_dlpack(output.as_tensor())

    def tensor_from_numpy(self, array: Any) -> Any:
        """A NumPy array as a torch tensor where the batches lie."""
        import torch

        host = torch.from_numpy(array)
        if self.device_id is None:
            return host
        with self._current():  # or pinning would take memory of GPU 0
            return host.pin_memory().to(f"cuda:{self.device_id}", non_blocking=True)  # unpinned, the host would wait

    def _current(self) -> AbstractContextManager[object]:
        """Inside, the GPU is CUDA's current one. Torch's default stream is the number 0, which DALI takes for that of
        the current GPU: were it another, DALI would wait for, and free memory by, the wrong stream.
        """
        if self.device_id is None:
            return nullcontext()
        import torch

        return torch.cuda.device(self.device_id)

    def to_device(self, node: Any) -> Any:
        """A DALI node of the reader, moved to where the operators are."""
        return node if self.device_id is None else node.gpu()


def dali() -> ModuleType:
    """The module nvidia.dali; raises UserError that says how to install it where it is missing."""
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.tensors
        import nvidia.dali.types
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("nvidia"):
            raise
        raise UserError(
            "NVIDIA DALI is not installed. Install it with: pip install 'alexnet[cuda13]' (or 'alexnet[cuda12]'; it "
            "runs on the CPU too). The package called plain nvidia-dali is a placeholder that fails."
        ) from None
    module: ModuleType = nvidia.dali
    return module
