"""Check that this working tree computes the same bits as another revision of the repository.

    python -m tools.compare_bits            # compares with 595f19d, the last revision without subpackages
    python -m tools.compare_bits HEAD~1

The tool copies both source trees into a temporary folder and compiles their C kernels there. You can therefore edit the
working tree during the comparison. The tool makes the photographs of the demo once. Each tree computes the following
results, in processes that import only the packages of that tree:

-   the store of the demo's photographs (fingerprints of both splits, colour statistics), with and without C kernels;
-   the first batches of the CPU stream in several settings, with C kernels and with DALI alone (ALEXNET_NATIVE=0);
-   seeded training runs: weights, velocity, metrics, and the class probabilities of the validation images.

tools/tree_bits.py hashes each result of each tree, and this tool compares the hashes. The exit code is 0 if all hashes
are the same. The exit code is 1 if a hash differs or a command failed. The comparison takes 7 minutes on two cores, and
needs 3 GB of disk space in the temporary folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from prep.console import CONTEXT_SETTINGS, UserError, duration_text, print_json, say
from tools.photo_digits import make_dataset

ROOT = Path(__file__).parent.parent
BASE = "595f19d"  # the last revision before the packages were divided into subpackages
WORKER = Path(__file__).with_name("tree_bits.py")
COMPARED = ("prep", "pipeline", "train", "tools")
# Keys of `alexprep pca-stats --json` that all revisions print.
_STATISTICS = ("records", "pixels", "mean_rgb", "covariance", "eigenvalues", "stdevs", "eigenvectors")


@dataclass(frozen=True)
class Run:
    """A short seeded training run on the CPU."""

    name: str
    options: str  # options for `alextrain run`
    kernels: bool = True  # True if the run uses C kernels
    evaluate: str = ""  # options for `alextrain evaluate` after the training; if empty, nothing is evaluated


RUNS = (
    Run("short", "--recipe short --batch 8 --steps 20", evaluate="--views 1"),
    Run("released", "--recipe released --batch 32 --steps 3"),
    Run("half, modern", "--model half --recipe modern --batch 32 --accumulate 2 --steps 4", evaluate="--views dense"),
    Run("short without C kernels", "--recipe short --batch 8 --steps 3", kernels=False),
)


class Tree:
    """A copy of one revision or checkout, with the hashes of the results that its packages compute."""

    def __init__(self, name: str, folder: Path, scratch: Path) -> None:
        self.name, self.folder, self.scratch = name, folder.resolve(), scratch.resolve()
        self.hashes: dict[str, str] = {}

    def compile(self) -> None:
        """Compile the C kernels. Raises UserError if a file cannot be compiled."""
        for source, library in self._worker("compile")["results"].items():
            if library is None:
                raise UserError(f"{self.name}: {source} could not be compiled. Install a C compiler, or set CC.")

    def build_stores(self, photographs: Path) -> None:
        """Build three stores of the demo's photographs: JPEG with C kernels, raw pixels, and JPEG without C kernels."""
        for folder, options, kernels in (("jpeg", "", True), ("ppm", "--format ppm", True), ("again", "", False)):
            store, name = self._store(folder), folder if kernels else "jpeg without C kernels"
            with timed(f"{self.name}: store, {name}"):
                self._command("alexprep", f"build-lmdb {photographs} --store {store} {options}", kernels)
            manifest = json.loads((store / "manifest.json").read_text())
            for split, about in manifest["splits"].items():
                self.hashes[f"store, {name}: fingerprint of {split}"] = about["fingerprint"]
            statistics = self._command("alexprep", f"pca-stats --store {store} --json", kernels)
            numbers = {name: json.loads(statistics)[name] for name in _STATISTICS}
            self.hashes[f"store, {name}: colour statistics"] = text_hash(json.dumps(numbers, sort_keys=True))

    def read_streams(self, batches: int) -> None:
        """Hash the first batches of the streams, with and without C kernels."""
        for kernels in (True, False):
            suffix = "" if kernels else ", without C kernels"
            with timed(f"{self.name}: batches of the stream{suffix}"):
                result = self._worker("stream", self._store("jpeg"), self._store("ppm"), batches, kernels=kernels)
            self._check_kernels(result["kernels"], ("pipeline",) if kernels else ())
            self.hashes |= {f"{name}{suffix}": value for name, value in result["results"].items()}

    def train(self, run: Run) -> None:
        """Run one training, hash the files that the run wrote, and remove the run folder."""
        run_dir, predictions = self.scratch / "run", self.scratch / "predictions.npz"
        store = f"--store {self._store('jpeg')} --gpus cpu"
        with timed(f"{self.name}: run {run.name}"):
            self._command("alextrain", f"run {store} --run-dir {run_dir} --log-every 1 {run.options}", run.kernels)
            loaded = json.loads((self.scratch / "kernels.json").read_text())
            self._check_kernels(loaded, ("pipeline", "train") if run.kernels else ())
            results = self._worker("run", run_dir)["results"]
            if run.evaluate:
                self._command(
                    "alextrain", f"evaluate {run_dir} {store} {run.evaluate} --out {predictions}", run.kernels
                )
                arrays = self._worker("probabilities", predictions)["results"]
                results |= {f"{name} by {run.evaluate}": value for name, value in arrays.items()}
        self.hashes |= {f"run {run.name}: {name}": value for name, value in results.items()}
        shutil.rmtree(run_dir)

    def _store(self, name: str) -> Path:
        return self.scratch / f"store-{name}"

    def _check_kernels(self, loaded: Sequence[str], expected: Sequence[str]) -> None:
        """Raise UserError if an expected kernel was not loaded, or if kernels were loaded although none is expected."""
        packages = sorted({library.split("/")[0] for library in loaded})
        missing = sorted(set(expected) - set(packages))
        if missing:
            raise UserError(f"{self.name}: the compiled kernels of {', '.join(missing)} were not loaded.")
        if packages and not expected:
            raise UserError(f"{self.name}: kernels of {', '.join(packages)} were loaded although ALEXNET_NATIVE=0.")

    def _command(self, program: str, arguments: str, kernels: bool) -> str:
        return self._python("command", self.scratch / "kernels.json", program, *arguments.split(), kernels=kernels)

    def _worker(self, *arguments: object, kernels: bool = True) -> Any:
        return json.loads(self._python(*arguments, kernels=kernels).splitlines()[-1])

    def _python(self, *arguments: object, kernels: bool) -> str:
        """Return the standard output of tools/tree_bits.py in this tree.

        If the program fails, raises UserError with the errors that the program printed.
        """
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("ALEXNET_STORE", None)
        environment.pop("ALEXNET_NATIVE", None)
        if not kernels:
            environment["ALEXNET_NATIVE"] = "0"
        command = [sys.executable, "-P", str(WORKER), *map(str, arguments)]
        ended = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise UserError(f"{self.name}: `{' '.join(map(str, arguments))}` failed:\n{ended.stderr.strip()[-2000:]}")
        return ended.stdout


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Print the name of a step, and how long the step took."""
    started = time.monotonic()
    yield
    say(f"{step} ({duration_text(time.monotonic() - started)})")


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text."""
    return sha256(text.encode()).hexdigest()


def export_revision(revision: str, folder: Path) -> None:
    """Write the packages and tools of a git revision into a new folder. Raises UserError for an unknown revision."""
    with tempfile.TemporaryFile() as archive:
        command = ["git", "-C", str(ROOT), "archive", "--format=tar", revision, *COMPARED]
        ended = subprocess.run(command, stdout=archive, stderr=subprocess.PIPE, text=True, check=False)
        if ended.returncode:
            raise UserError(
                f"{revision}: git archive failed ({ended.stderr.strip()}). Name a revision that has the folders "
                f"{', '.join(COMPARED)}."
            )
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            tar.extractall(folder, filter="data")


def copy_tree(tree: Path, folder: Path) -> None:
    """Copy the packages and tools of a checkout, without files that git ignores, into a new folder."""
    command = ["git", "-C", str(tree), "ls-files", "-z", "--cached", "--others", "--exclude-standard", *COMPARED]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UserError(f"--tree {tree}: git ls-files failed ({ended.stderr.strip()}). Name a git checkout.")
    for name in filter(None, ended.stdout.split("\0")):
        if (tree / name).is_file():  # git ls-files also lists deleted files that are still in the index
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / name, folder / name)


def compare(revision: str, tree: Path, photographs: int | None, batches: int) -> list[dict[str, Any]]:
    """Return a row for each result: name, hash in `revision`, hash in `tree`, and whether the hashes agree."""
    with tempfile.TemporaryDirectory(prefix="compare-bits-") as temporary:
        scratch = Path(temporary)
        trees = []
        for name, side in ((revision, "there"), ("working tree" if tree == ROOT else str(tree), "here")):
            (scratch / side).mkdir()
            trees.append(Tree(name, scratch / side, scratch / f"{side}-results"))
            trees[-1].scratch.mkdir()
        export_revision(revision, trees[0].folder)
        copy_tree(tree, trees[1].folder)
        with timed("photographs"):
            make_dataset(scratch / "photographs", limit=photographs)
        for each in trees:
            with timed(f"{each.name}: C kernels compiled"):
                each.compile()
        for each in trees:
            each.build_stores(scratch / "photographs")
        for each in trees:
            each.read_streams(batches)
        for run in RUNS:
            for each in trees:
                each.train(run)
        there, here = (each.hashes for each in trees)
    return [
        {"name": name, "there": there.get(name), "here": here.get(name), "same": there.get(name) == here.get(name)}
        for name in dict.fromkeys([*there, *here])
    ]


def table(rows: Sequence[dict[str, Any]], revision: str) -> str:
    """Return the rows as text, one line for each row, with the first 12 digits of the hashes."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'result':<{width}}  {revision[:12]:<12}  {'here':<12}"]
    for row in rows:
        hashes = [(row[side] or "missing")[:12] for side in ("there", "here")]
        verdict = "same" if row["same"] else "DIFFERENT"
        lines.append(f"{row['name']:<{width}}  {hashes[0]:<12}  {hashes[1]:<12}  {verdict}")
    return "\n".join(lines)


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("revision", default=BASE)
@click.option(
    "--tree",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=ROOT,
    help="Checkout to compare with REVISION.  [default: the checkout of this program]",
)
@click.option(
    "--photographs",
    type=click.IntRange(200),
    metavar="N",
    help="Number of photographs to make; fewer photographs take less time.  [default: 1,797, as in the demo]",
)
@click.option(
    "--batches",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    metavar="N",
    help="Number of batches of each stream to hash.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def main(revision: str, tree: Path, photographs: int | None, batches: int, as_json: bool) -> None:
    """Check that the working tree computes the same bits as REVISION (default 595f19d) of this repository.

    The results are the demo's store, batches of the CPU stream, and short seeded training runs. The exit code is 0 if
    the hashes of all results are the same.

    \b
    Example:
      python -m tools.compare_bits
      python -m tools.compare_bits HEAD~1 --photographs 300 --json
    """
    try:
        rows = compare(revision, tree.resolve(), photographs, batches)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    same = all(row["same"] for row in rows)
    if as_json:
        print_json({"revision": revision, "same": same, "results": rows})
    else:
        click.echo(table(rows, revision))
        different = sum(not row["same"] for row in rows)
        click.echo(f"{len(rows)} results: " + ("all the same." if same else f"{different} different."))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
