"""Turns out-of-memory errors of a device or the host into a UserError that names options that need less memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prep.console import UserError
from train.config.run_config import RunConfig
from train.runs import checkpoint

# An out-of-memory error that is a plain RuntimeError is recognized by one of these texts in its message. The first text
# comes from torch's CPU allocator, the second from the CUDA driver and from DALI, and the third from cuBLAS.
_MESSAGES = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def out_of_memory(config: RunConfig, runs: int = 1) -> Iterator[None]:
    """Return a context that turns out-of-memory errors into a UserError that names options that need less memory.

    `runs` is the number of runs that are trained at the same time, with this configuration.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        has_type = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not has_type and not any(message in str(error) for message in _MESSAGES):
            raise
        raise UserError(_advice(config, runs, str(error).strip().split("\n")[0][:200])) from None


def _advice(config: RunConfig, runs: int, message: str) -> str:
    batch, parts, replicas = config.batch_size, config.accumulate, config.replicas
    share = batch // replicas  # number of images of a step on each replica
    more_parts = next((n for n in range(2 * parts, share + 1) if share % n == 0), None)
    options = [f"--accumulate {more_parts} (the same batch in {more_parts} parts)"] * (more_parts is not None)
    options += [f"--batch {share // 2 * replicas}"] * (share > 1)
    advice = " or ".join(options) or "a smaller --model"
    if checkpoint.checkpoint_paths(config.run_dir):
        advice += ", with --fork NEW_DIR to continue from the newest checkpoint"
    if runs > 1:
        advice = f"--one-at-a-time (the {runs} networks are trained one after another), or {advice}"
    given = f"--batch {batch}" + (f" --accumulate {parts}" if parts > 1 else "")
    devices = " and ".join(dict.fromkeys(config.devices))
    return f"{given}: out of memory on {devices} ({message}). Pass {advice}."
