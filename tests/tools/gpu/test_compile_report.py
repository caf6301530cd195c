"""The Triton kernels compile for a GPU on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tests.helpers.project import ROOT
from tools.gpu import compile_report


@pytest.mark.soak
def test_the_kernels_compile_for_a_gpu_and_their_values_fit_into_registers() -> None:
    """The report runs in a process without the variable TRITON_INTERPRET, so that Triton compiles the kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")
    program = "import json; from tools.gpu.compile_report import report; "
    program += "print(json.dumps([row._asdict() for row in report(90, ('bf16',))]))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["layer"], row["kernel"]) for row in rows] == [
        (layer, f"{kind}_{way}")
        for layer, kind in (("layer 1", "pooled"), ("layer 2", "pooled"), ("conv3, conv4", "pointwise"))
        for way in ("forward", "backward")
    ]
    assert all(row["registers"] <= 255 and row["spilled_bytes"] <= 64 for row in rows), rows
    assert all(row["shared_bytes"] < 227 << 10 for row in rows), rows


def test_tritons_interpreter_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = CliRunner().invoke(compile_report.main, [])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "Unset the variable" in result.stderr
