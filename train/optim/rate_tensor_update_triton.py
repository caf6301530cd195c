"""Triton kernel of rate_tensor_update.py: one launch updates all parameters."""

# mypy: disable-error-code="no-untyped-def"
# Triton compiles the type annotations along with the functions, and accepts only its own types.

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _tensor(table, entry):
    """Return the pointer to a float32 tensor: the address table[entry], which is a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(table + entry), 16).to(tl.pointer_type(tl.float32))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def update(table, blocks, decays, scales, rates, momentum, BLOCK: tl.constexpr):
    """Update BLOCK values of a parameter. A row of `blocks` is (index of the parameter, index of the first value)."""
    index = tl.load(blocks + 2 * tl.program_id(0))
    i = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    inside = i < tl.load(table + 5 * index + 3)
    rate = tl.load(rates + tl.load(table + 5 * index + 4)) * tl.load(scales + index)
    decay = tl.load(decays + index)
    weights, velocities = _tensor(table, 5 * index) + i, _tensor(table, 5 * index + 1) + i
    w = tl.load(weights, mask=inside, other=0.0)
    g = tl.load(_tensor(table, 5 * index + 2) + i, mask=inside, other=0.0)
    v = momentum * tl.load(velocities, mask=inside, other=0.0) - rate * (g + decay * w)
    tl.store(velocities, v, mask=inside)
    tl.store(weights, w + v, mask=inside)
