"""Tests of docs/guides/many-gpus.md. Commands for a CPU are executed with a small network; all others are parsed."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributed.run import config_from_args, parse_args

from prep.console import CONTEXT_SETTINGS
from tests.helpers.alextrain import alextrain
from tests.helpers.project import ROOT
from tests.helpers.small_training import SMALL_ALEXNET
from tests.helpers.torchrun.job import Torchrun
from train.cli.run import run
from train.config.architecture import ARCHITECTURES
from train.runs import checkpoint

PAGE = (ROOT / "docs/guides/many-gpus.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"^    ((?:alextrain|torchrun) .*)$", PAGE, re.MULTILINE)]
SMALL = str(ROOT / "tests/helpers/torchrun/small_alextrain.py")  # alextrain with a small network


def with_full_paths(words: list[str], folder: Path) -> list[str]:
    """Return the words of a command with absolute paths of folders, because torchrun has another working directory."""
    options = ("--store", "--run-dir", "evaluate")
    return [str(folder / word) if before in options else word for before, word in pairwise(["", *words])]


@pytest.mark.soak
def test_the_commands_for_a_cpu_work_and_replicas_train_like_one_process(
    torchrun: Torchrun, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "alexnet", SMALL_ALEXNET)
    (tmp_path / "store").symlink_to(store)
    assert len(COMMANDS) >= 6
    for program, *words in COMMANDS:
        words = with_full_paths(words, tmp_path)
        if program == "alextrain":
            result = alextrain(*words)
            assert result.exit_code == 0, result.output
        else:
            at = words.index("-m")
            job = torchrun(*words[:at], SMALL, *words[at + 2 :])
            assert job.wait() == 0, job.stderr
    alone, *groups = (checkpoint.load(tmp_path / name) for name in ("run", "group", "elastic"))
    assert alone.step >= 3
    for state in groups:
        assert state.step == alone.step
        for name, parameter in alone.parameters.items():
            torch.testing.assert_close(state.parameters[name], parameter, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "group" / "evaluations.jsonl").read_text().count("\n") == 1


def test_the_commands_for_gpus_are_valid() -> None:
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]
    lines = [line[line.index("torchrun") :] for block in blocks for line in block.splitlines() if "torchrun " in line]
    assert len(lines) == 4
    for line in lines:
        arguments = parse_args(shlex.split(line.replace('"$SLURM_NNODES"', "4"))[1:])  # torchrun's own parser
        config, _, _ = config_from_args(arguments)
        assert arguments.module and arguments.training_script == "train"
        command, *words = arguments.training_script_args
        assert command == "run"
        parameters = run.make_context("run", words, **CONTEXT_SETTINGS).params
        assert parameters["batch"] % (config.nproc_per_node * config.max_nodes) == 0
        assert parameters["gpus"] in ("1", "2")
