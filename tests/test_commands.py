"""Every command of the project has a help text with an example, and prints one clear line for a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import pipeline.cli
import prep.cli
import train.cli
from train.config.recipes import RECIPES

GROUPS = {"alexprep": prep.cli.main, "alexstream": pipeline.cli.main, "alextrain": train.cli.main}
COMMANDS = [(group, name) for group, main in GROUPS.items() for name in main.commands]


def run_command(group: str, *args: str) -> tuple[int, str, str]:
    """Return (exit code, standard output, standard error)."""
    result = CliRunner().invoke(GROUPS[group], list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(("group", "name"), COMMANDS)
def test_every_command_has_help_with_an_example_and_explains_every_option(group: str, name: str) -> None:
    for option in ("--help", "-h"):
        code, out, _ = run_command(group, name, option)
        assert code == 0 and "Example:" in out and f"{group} {name}" in out
    for parameter in GROUPS[group].commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{group} {name} {parameter.name}"
            assert not parameter.help.startswith("Of "), f"{group} {name} {parameter.name}: help without a subject"


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_help_and_a_version(group: str) -> None:
    code, out, _ = run_command(group, "--help")
    assert code == 0 and "Example:" in out
    assert all(name in out for name in GROUPS[group].commands)
    assert run_command(group, "--version")[0] == 0


def test_options_offer_the_choices_that_the_code_accepts() -> None:
    from prep.inputs.labels import LABEL_ORDERS
    from prep.store.manifest import FILTERS, FORMATS, SPLITS

    for command in (prep.cli.main.commands["build-lmdb"], prep.cli.main.commands["import-caffe"]):
        choices = {p.name: p.type.choices for p in command.params if isinstance(p.type, click.Choice)}
        assert tuple(choices["format"]) == FORMATS and tuple(choices["filter"]) == FILTERS
        assert tuple(choices["split"]) == SPLITS
        assert tuple(choices.get("label_order", LABEL_ORDERS)) == LABEL_ORDERS
    from train.config.choices import ACTIVATIONS, SCHEDULES
    from train.config.overrides import apply_overrides
    from train.model.layers import ACTIVATION_FUNCTIONS

    assert tuple(ACTIVATION_FUNCTIONS) == ACTIVATIONS
    for word in SCHEDULES:
        assert apply_overrides(RECIPES["released"], [f"schedule={word}"]).name == f"released, schedule={word}"


MISTAKES = [
    (["alexprep", "build-lmdb", "nowhere"], "nowhere: no such folder"),
    (["alexprep", "build-lmdb", "empty"], "empty: the folder is empty"),
    (["alexprep", "pca-stats", "--store", "nowhere"], "nowhere: no such store"),
    (["alexprep", "build-lmdb", "a-file"], "a-file is not a tar archive"),
    (["alexprep", "build-lmdb", "PHOTOS", "--store", "old"], "built with store version 99"),
    (["alexprep", "build-lmdb", "PHOTOS", "--split", "val", "--labels", "no.txt", "--store", "store"], "no.txt"),
    (["alexprep", "verify", "--store", "nowhere"], "nowhere: no such store"),
    (["alexprep", "verify", "--store", "empty"], "no manifest.json"),
    (["alexprep", "verify", "--store", "old"], "built with store version 99"),
    (["alexprep", "inspect", "--store", "nowhere"], "nowhere: no such store"),
    (["alexprep", "inspect", "--store", "STORE", "--key", "99"], "no key 00000099"),
    (["alexprep", "export-files", "out", "--store", "nowhere"], "nowhere: no such store"),
    (["alexprep", "import-caffe", "nowhere", "--store", "store"], "nowhere"),
    (["alexprep", "import-caffe", "empty", "--store", "store"], "empty"),
    (["alexstream", "preview", "out.png", "--store", "nowhere"], "nowhere: no such store"),
    (["alexstream", "bench", "--store", "old"], "built with store version 99; this program reads version 1"),
    (["alextrain", "run", "--store", "old"], "built with store version 99; this program reads version 1"),
    (["alextrain", "run", "--store", "empty"], "no manifest.json"),
    (["alextrain", "evaluate", "nowhere", "--store", "STORE"], "nowhere: no such run"),
    (["alextrain", "evaluate", "empty", "--store", "STORE"], "empty: has no checkpoint"),
    (["alextrain", "evaluate", "empty", "--store", "STORE", "--split", "test"], "Name another --split."),
    (["alextrain", "figures", "nowhere"], "nowhere: no such run"),
    (["alextrain", "status", "no where"], "no such run. Train a run with: alextrain run --run-dir 'no where'"),
    (["alextrain", "report", "empty"], "empty: has no checkpoint"),
    (["alextrain", "predict", "nowhere", "a-file"], "nowhere: no such run"),
    (["alextrain", "features", "empty", "--store", "nowhere", "--out", "f.npy"], "nowhere: no such store"),
    (["alextrain", "search", "empty", "a-file"], "empty: has no checkpoint"),
]

WRONG_ARGUMENTS = [
    (["alexprep", "inspect", "--store", "STORE", "--out", "out.png"], "--key"),
    (["alextrain", "run", "--store", "STORE", "--gpus", "0,1,2"], "--gpus 0,1,2: AlexNet has two columns"),
    (["alextrain", "run", "--store", "STORE", "--gpus", "7,8"], "--gpus 7,8: there is no GPU 7"),
    (["alextrain", "run", "--store", "STORE", "--gpus", "one"], "--gpus one: expected two GPUs (0,1)"),
    (["alextrain", "run", "--store", "STORE", "--gpus", "cpu", "--batch", "999"], "--batch 999"),
    (["alextrain", "evaluate", "a.npz", "b.npz", "--weights", "1"], "--weights 1: expected 2 numbers"),
    (["alextrain", "summary", "--gpus", "0,1,2"], "AlexNet has two columns"),
    (["alextrain", "recipe", "--set", "lr=fast"], "--set lr=fast: expected a number"),
    (["alextrain", "run", "--store", "STORE", "--set", "lrr=1"], "there is no lrr. Did you mean lr"),
    (["alextrain", "run", "--store", "STORE", "--model", "half", "--gpus", "0,1"], "this network has one column"),
    (["alextrain", "run", "--store", "STORE", "--gpus", "cpu", "--accumulate", "3"], "--accumulate 3: a batch of 128"),
    (["alextrain", "run", "--store", "STORE", "--gpus", "cpu", "--precision", "tf32"], "only GPUs have TF32"),
    (
        ["alextrain", "run", "--store", "STORE", "--batch", "8", "--run-dir", "empty", "--fork", "empty"],
        "--run-dir itself",
    ),
    (["alextrain", "recipe", "--set", "lrn.alpah=1"], "there is no alpah. Did you mean alpha?"),
    (["alextrain", "recipe", "--set", "activation=rellu"], "Did you mean relu?"),
    (["alextrain", "recipe", "--set", "augmentation.divisor=0"], "divisors more than 0"),
    (["alextrain", "recipe", "relesed"], "Did you mean released?"),
    (["alextrain", "run", "--model", "alexent"], "Did you mean alexnet?"),
    (["alextrain", "runs"], "Did you mean 'run'"),
    (["alextrain", "run", "--stor", "x"], "'--store'"),
    (["alexprep", "merge", "STORE", "--store", "new"], "1 store to merge; expected two or more"),
    (["alexprep", "merge", "STORE", "STORE", "--store", "new"], "named twice"),
    (["alextrain", "compare", "empty"], "a comparison needs two or more runs"),
    (["alextrain", "compare", "empty", "empty"], "empty: named twice"),
    (["alexprep", "copy", "ftp://a/b", "c"], "ftp:// is not supported"),
    (["alexprep", "verify", "--store", "STORE", "--cluster", "here"], "cluster 'here': expected local, auto"),
    (["alexprep", "build-lmdb", "PHOTOS", "--part", "3/2"], "--part 3/2: expected I/N"),
    (["alexprep", "pca-stats", "--store", "STORE", "--plot", "plot.gif"], "a figure is .png or .svg"),
    (["alexprep", "pca-stats", "--store", "STORE", "--plot", "no/plot.png"], "there is no folder no"),
    (["alexprep", "inspect", "--store", "STORE", "--key", "0", "--out", "no/out.jpg"], "there is no folder no"),
    (["alexprep", "build-lmdb", "PHOTOS", "--store", "a-file"], "a-file is a file, not a folder"),
    (["alexstream", "preview", "a.xyz", "--store", "STORE"], "a.xyz: a contact sheet is an image file"),
    (["alexstream", "preview", "no/a.png", "--store", "STORE"], "there is no folder no"),
    (["alextrain", "compare", "empty", "old", "--out", "a.xyz"], "a figure is .png or .svg. Name it a.png or a.svg"),
    (["alextrain", "search", "empty", "a-file", "--out", "a.xyz"], "a figure is .png or .svg"),
    (["alextrain", "features", "empty", "--out", "a.xyz"], "features are written as .npy. Name it a.npy"),
    (["alextrain", "evaluate", "empty", "--out", "a.xyz"], "probabilities are saved as .npz. Name it a.npz"),
    (["alextrain", "evaluate", "empty", "--out", "no/a.npz"], "there is no folder no"),
    (["alextrain", "report", "empty", "--out", "a.xyz"], "a report is .html"),
    (["alextrain", "export", "empty", "--to", "onnx", "--out", "old"], "'old' is a directory"),
    (
        ["alextrain", "run", "--store", "STORE", "--gpus", "cpu", "--batch", "8", "--run-dir", "a-file/x"],
        "--run-dir a-file/x",
    ),
    (["alexprep", "export-files", "a-file", "--store", "STORE"], "'a-file' is a file"),
    (["alexprep", "export-files", "a-file/out", "--store", "STORE"], "a-file is a file"),
    (["alexprep", "export-files", "old", "--store", "STORE"], "old: the folder has other files"),
    (["alexprep", "merge", "STORE", "old", "--store", "a-file"], "a-file is a file"),
    (["alexprep", "import-caffe", "old", "--store", "a-file/x"], "a-file is a file"),
    (["alextrain", "ablate", "--store", "STORE", "--out", "a-file"], "a-file is a file"),
    (["alexstream", "bench", "--store", "STORE", "--device", "gpu"], "device 'gpu': expected cpu or cuda:N"),
    (["alexstream", "inspect", "--store", "STORE", "--batch", "99"], "Choose a smaller --batch"),
    (["alexstream", "inspect", "--store", "STORE", "--epoch", "9" * 30], "is not in the range 0<=x<="),
    (["alexprep", "verify", "--store", ""], "--store: the value is empty"),
    (["alexprep", "build-lmdb", "PHOTOS", "--time-limit", "nan"], "'nan' is not a number"),
    (["alexprep", "build-lmdb", "PHOTOS", "--time-limit", "inf"], "inf is not in the range"),
    (["alexstream", "bench", "--store", "STORE", "--seconds", "nan"], "'nan' is not a number"),
    (["alexstream", "bench", "--store", "STORE", "--threads", "9" * 30], "is not in the range 1<=x<=1024"),
]


CASES = [(args, message, 1) for args, message in MISTAKES] + [(args, message, 2) for args, message in WRONG_ARGUMENTS]


@pytest.mark.parametrize(("args", "message", "code"), CASES, ids=[" ".join(args)[:50] for args, _, _ in CASES])
def test_a_mistake_is_reported_in_one_line_and_a_wrong_argument_ends_with_exit_code_2(
    args: list[str],
    message: str,
    code: int,
    store: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    Path("empty").mkdir()
    Path("old").mkdir()
    Path("old/manifest.json").write_text(json.dumps({"kind": "alexnet-store", "schema": 99}))
    args = [{"STORE": str(store), "PHOTOS": str(photo_folder)}.get(arg, arg) for arg in args]
    exit_code, out, err = run_command(*args)
    assert exit_code == code and out == ""
    *messages, error = [line for line in err.splitlines() if line and not line.startswith(("Usage: ", "Try "))]
    assert error.startswith("Error: ") and message in error and "Traceback" not in err
    assert not messages or args[:2] == ["alextrain", "run"]  # `alextrain run` first prints a description of the run
    assert not Path("run").exists() and not Path("out.png").exists() and not Path("store").exists()


def test_a_missing_dali_is_reported_in_one_line_with_the_extra_to_install(store: Path) -> None:
    script = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[:2] == ['nvidia', 'dali']:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from pipeline.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "bench", "--store", str(store)]
    environment = {**os.environ, "ALEXNET_NATIVE": "0"}  # with the C kernels, a stream on a CPU needs no DALI
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "NVIDIA DALI is not installed" in result.stderr and "nvidia-dali-cuda130>=2.4,<3" in result.stderr
