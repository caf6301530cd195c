"""Test of the batch script for SLURM in docs/guides/many-gpus.md, with substitutes for srun and torchrun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from torch.distributed.run import config_from_args, parse_args

from prep.console import CONTEXT_SETTINGS
from tests.helpers.project import ROOT
from train.cli.run import run

# The substitute for srun: it starts the command once for each node, all at the same time, with the node's number.
SRUN = """#!/bin/bash
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" & done
wait
"""
TORCHRUN = """#!{python}
import json, os, sys
slurm = {{name: value for name, value in os.environ.items() if name.startswith(("SLURM", "SRUN"))}}
with open({folder!r} + "/call-" + os.environ["SLURM_NODEID"], "w") as file:
    json.dump([sys.argv[1:], slurm], file)
"""


def test_the_batch_script_starts_one_torchrun_on_each_node_with_valid_arguments(tmp_path: Path) -> None:
    page = (ROOT / "docs/guides/many-gpus.md").read_text()
    (script,) = [block for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "#SBATCH" in block]
    options = dict(re.findall(r"--([a-z-]+)(?:=(\S+))?", " ".join(re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE))))
    assert options["ntasks-per-node"] == "1"
    for name, text in (("srun", SRUN), ("torchrun", TORCHRUN.format(python=sys.executable, folder=str(tmp_path)))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    activate = re.search(r"^\. (\S+)$", script, re.MULTILINE)
    assert activate is not None
    (tmp_path / "train.sh").write_text(script.replace(activate[0], ":"))
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_NNODES": options["nodes"],
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_JOB_ID": "4711",
    }
    subprocess.run(["bash", "-eu", str(tmp_path / "train.sh")], env=environment, check=True)
    calls = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("call-*"))]
    assert len(calls) == int(options["nodes"]) and all(call[0] == calls[0][0] for call in calls)
    assert [call[1]["SLURM_NODEID"] for call in calls] == [str(node) for node in range(len(calls))]
    assert calls[0][1]["SRUN_CPUS_PER_TASK"] == options["cpus-per-task"]

    arguments = parse_args(calls[0][0])  # type: ignore[no-untyped-call]  # torchrun's own parser
    config, _, _ = config_from_args(arguments)
    assert (config.min_nodes, config.max_nodes) == (len(calls), len(calls)) and config.run_id == "4711"
    assert config.nproc_per_node == int(options["gpus-per-node"]) and config.rdzv_backend == "c10d"
    host, _, port = config.rdzv_endpoint.partition(":")
    assert host == os.uname().nodename and port.isdecimal()
    assert arguments.module and arguments.training_script == "train"
    command, *words = arguments.training_script_args
    assert command == "run"
    parsed = run.make_context("run", words, **CONTEXT_SETTINGS).params
    assert parsed["gpus"] == "1" and parsed["batch"] % (config.nproc_per_node * len(calls)) == 0
