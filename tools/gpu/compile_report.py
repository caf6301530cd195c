"""Compiles the Triton kernels for a GPU, and prints registers, spills and shared memory. The GPU need not be present.

    python -m tools.gpu.compile_report --capability 90

If the values of a kernel do not fit into registers, the kernel spills values to memory and is slow. ptxas, which comes
with Triton, compiles for any GPU. Even a machine without a GPU therefore shows whether the kernels compile.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from prep.console import UserError, json_option, print_json, progress
from tools.bench.harness import BenchmarkCommand

# (name of the layer, number of maps of a column, side of a pooling window in px; 0: no pooling)
_LAYERS = (("layer 1", 48, 3), ("layer 2", 128, 3), ("conv3, conv4", 192, 0))
# {compute capability: shared memory of a program in bytes}; all other GPUs have 99 KiB.
_SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
_FLOATS = ("alpha", "beta", "k")
_POINTERS = {"bias": "*fp32", "bias_sums": "*fp32", "argmax": "*u8"}
_TENSORS = ("x", "out", "grad", "x_grad")


class Row(NamedTuple):
    """Resources of one compiled kernel."""

    layer: str
    kernel: str
    dtype: str  # "bf16" or "fp32"
    warps: int
    registers: int  # number of registers of a thread, at most 255
    spilled_bytes: int  # per thread
    shared_bytes: int  # per program


def report(
    capability: int, dtypes: tuple[str, ...] = ("bf16", "fp32"), done: Callable[[int], None] = lambda kernels: None
) -> list[Row]:
    """Compile the forward and backward kernels of each epilogue (the work between two convolutions) of the paper."""
    from train.config.recipes import PAPER
    from train.model.gpu import epilogue_triton
    from train.model.gpu.epilogue import Epilogue, kernel_constants, stages_for, warps_for

    rows = []
    for layer, maps, pool_px in _LAYERS:
        for dtype in dtypes:
            norm = PAPER.lrn if pool_px else None
            _, constants = kernel_constants(maps, dtype == "fp32", Epilogue("relu", norm, pool_px))
            kind = "pooled" if pool_px else "pointwise"
            for way in ("forward", "backward"):
                kernel = getattr(epilogue_triton, f"{kind}_{way}")
                extra = {"POOL": pool_px, "AFTER": "none"} if pool_px else {"TILES": 8} if way == "backward" else {}
                warps = warps_for(maps, backward=way == "backward")
                stages = 3  # Triton's default
                if kernel is epilogue_triton.pooled_backward:
                    stages = stages_for(maps, dtype == "fp32", False, _SHARED_BYTES.get(capability, 99 << 10))
                options = {"num_warps": warps, "num_stages": stages}
                registers, spilled, shared = _compile(kernel, {**constants, **extra}, dtype, options, capability)
                done(1)
                rows.append(Row(layer, f"{kind}_{way}", dtype, warps, registers, spilled, shared))
    return rows


def _compile(
    kernel: Any, constants: Mapping[str, Any], dtype: str, options: Mapping[str, int], capability: int
) -> tuple[int, int, int]:
    """Return registers and spilled bytes of a thread, and shared bytes of a program."""
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from triton.compiler import ASTSource  # type: ignore[import-not-found,import-untyped,unused-ignore]

    constants = {**constants, **{name: 1 for name in ("out_map", "grad_map") if name in kernel.arg_names}}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{dtype}" if name in _TENSORS else "fp32" if name in _FLOATS else _POINTERS.get(name, "i32")
        if (
            signature[name].startswith("*")
            or name == "maps"
            or name.endswith(("_image", "_row", "_column", "_position"))
        ):
            attributes[(position,)] = [["tt.divisibility", 16]]  # Triton infers this divisor for the paper's shapes
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    return int(match[1]), int(match[2]), int(compiled.metadata.shared)


@click.command(cls=BenchmarkCommand)
@click.option(
    "--capability",
    type=click.Choice(["80", "86", "89", "90"]),
    default="90",
    show_default=True,
    help="Compute capability of the GPU, without the point: 90 for 9.0.",
)
@json_option
def main(capability: str, as_json: bool) -> None:
    """Compile the Triton kernels of the network without a GPU, and print the resources that each kernel needs.

    \b
    Example:
      python -m tools.gpu.compile_report --capability 90
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET is 1: Triton's interpreter compiles nothing. Unset the variable.")
    if importlib.util.find_spec("triton") is None:
        raise UserError("Triton is not installed. Install Triton with: pip install triton")
    with progress("compiling", 4 * len(_LAYERS), "kernels") as counter:
        rows = report(int(capability), done=counter.advance)
    if as_json:
        print_json({"capability": int(capability), "kernels": [row._asdict() for row in rows]})
        return
    click.echo(
        f"{'layer':14}{'kernel':20}{'type':6}{'warps':>6}{'registers':>11}{'spilled bytes':>15}{'shared bytes':>14}"
    )
    for row in rows:
        click.echo(
            f"{row.layer:14}{row.kernel:20}{row.dtype:6}{row.warps:6}{row.registers:11}{row.spilled_bytes:15}"
            f"{row.shared_bytes:14}"
        )


if __name__ == "__main__":
    main()
