"""Edits files, and checks that commands refuse each wrong file with one line of error.

    python -m tools.edit_files
    python -m tools.edit_files --only store/manifest.json --share 0.1 --json

The tool makes an example of every file that the commands read (tools/edits/samples.py). The tool then edits a copy of
each file. tools/edits/targets.py lists the files, the edits and the commands. After each edit, the tool runs a command
that reads the file. The command must end in one of two ways, within the time limit and with less than 1 GB of memory:

-   The command refuses the file: the exit code is not 0, and the last line begins with `Error: `. The command may print
    notes before this line. The command must not change files, except the files that `_MAY_CHANGE` in
    tools/edits/processes.py names, such as locks and the status of a run.
-   The command accepts the file: the exit code is 0, and a rule in tools/edits/rules.py allows the edit.

The output must never contain control characters. The exit code of the tool is 0 if all commands ended as required.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import click

from prep.console import CONTEXT_SETTINGS, UserError, count_noun, print_json, print_line, progress
from tools.edits.processes import ACCEPTED, ONE_LINE, Outcome, check_edit, import_modules
from tools.edits.rules import reason_to_accept
from tools.edits.samples import use_small_networks
from tools.edits.targets import TARGETS, UNCHANGED, Edit, Target, edits_of


@dataclass(frozen=True)
class Choice:
    """Selects the edits and commands to try. An empty tuple selects all files, all kinds or all commands."""

    only: tuple[str, ...] = ()  # an edit is selected if its FILE:FIELD contains one of these texts
    kinds: tuple[str, ...] = ()  # kinds of edits
    commands: tuple[str, ...] = ()  # a command is selected if its command line contains one of these texts
    every_command: bool = False  # True: run all commands that read the file; False: run one command for each edit
    share: float = 1.0  # share of the edits to make, 0 to 1
    seed: int = 0  # seed of the random choice of edits and commands


SLOW_COMMANDS = ("alextrain run", "alextrain report", "alextrain ablate", "alexprep build-lmdb")
BELIEVED = "believed"  # verdict on a command that accepted an edit although no rule allows the edit
Job = tuple[Target, Edit, list[str]]


def jobs_of(samples: Path, choice: Choice) -> list[Job]:
    """Return the edits to try, each with the commands to run. A file is left out if its folder is not in `samples`."""
    rng, jobs = random.Random(choice.seed), []
    for target in TARGETS:
        is_there = (samples / target.file).parent.exists()
        named = not choice.only or any(name.partition(":")[0] in target.file for name in choice.only)
        commands = [command for command in target.commands if any(text in command for text in choice.commands or ("",))]
        if not is_there or not named or not commands:
            continue
        for edit in edits_of(target, samples):
            label = f"{edit.file}:{edit.field}"
            is_named = not choice.only or any(name in label for name in choice.only)
            if is_named and (not choice.kinds or edit.kind in choice.kinds) and rng.random() < choice.share:
                jobs.append((target, edit, commands if choice.every_command else _drawn(commands, rng)))
    rng.shuffle(jobs)
    return jobs


def _drawn(commands: Sequence[str], rng: random.Random) -> list[str]:
    """Return one of the commands. A command of SLOW_COMMANDS is drawn one tenth as often as another command."""
    weights = [0.1 if command.startswith(SLOW_COMMANDS) else 1.0 for command in commands]
    return rng.choices(commands, weights)


def run_jobs(jobs: Sequence[Job], samples: Path, processes: int, limit_s: float) -> Iterator[Outcome]:
    """Run the jobs in forks of this process, and yield the outcomes as they arrive."""
    selector = selectors.DefaultSelector()
    for number in range(processes):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                _work(jobs[number::processes], samples, limit_s, pipe)
            os._exit(0)
        os.close(writing)
        selector.register(os.fdopen(reading), selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            file: IO[str] = key.fileobj  # type: ignore[assignment]  # os.fdopen has opened this file
            line = file.readline()
            if not line:
                selector.unregister(file)
                file.close()
                os.wait()
                continue
            yield Outcome(**json.loads(line))


def _work(jobs: Sequence[Job], samples: Path, limit_s: float, pipe: IO[str]) -> None:
    for target, edit, commands in jobs:
        try:
            outcomes = check_edit(target, edit, commands, samples, limit_s)
        except Exception:
            text = traceback.format_exc()
            outcomes = [Outcome(edit.file, edit.field, edit.kind, "", "not applied", -1, text, 0, 0)]
        for outcome in outcomes:
            pipe.write(json.dumps(asdict(outcome)) + "\n")
        pipe.flush()


def judged(outcome: Outcome) -> Outcome:
    """Return an outcome with its final verdict.

    The verdict is BELIEVED if the command accepted an edit that no rule allows, and `refused` if the command did not
    accept an unchanged file.
    """
    if outcome.kind == UNCHANGED:
        return outcome if outcome.verdict == ACCEPTED else replace(outcome, verdict="refused")
    if outcome.verdict == ACCEPTED and reason_to_accept(outcome) is None:
        return replace(outcome, verdict=BELIEVED)
    return outcome


def table_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines of a table. Each line has a file, a command, and the number of outcomes for each verdict."""
    verdicts = [ONE_LINE, ACCEPTED]
    verdicts += sorted({outcome.verdict for outcome in outcomes} - set(verdicts))
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        name = " ".join(outcome.command.split()[:2])
        for key in ((outcome.file, name), ("all files", "")):
            counts.setdefault(key, Counter())[outcome.verdict] += 1
    width = max(len(f"{file}  {command}") for file, command in counts)
    lines = ["  ".join([f"{'file, command':{width}}", f"{'edits':>6}", *verdicts])]
    for (file, command), count in sorted(counts.items()):
        numbers = [f"{count[verdict]:>{len(verdict)}}" for verdict in verdicts]
        lines.append("  ".join([f"{f'{file}  {command}':{width}}", f"{count.total():>6}", *numbers]))
    return lines


@click.command(context_settings=CONTEXT_SETTINGS)
@click.option("--only", multiple=True, metavar="TEXT", help="Make only edits whose FILE:FIELD contains TEXT.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Make only edits of this kind, such as delete.")
@click.option("--command", "commands", multiple=True, metavar="TEXT", help="Run only command lines that contain TEXT.")
@click.option(
    "--every-command",
    is_flag=True,
    help="After each edit, run all commands that read the file.  [default: one command, drawn with the seed; slow "
    "commands are drawn less often]",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the edits to make, drawn at random.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random choice.")
@click.option("--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Number of processes.")
@click.option(
    "--limit", type=click.FloatRange(1), default=20.0, show_default=True, help="Time limit of a command in seconds."
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of examples that tools.edits.samples has made.  [default: new examples]",
)
@click.option("--no-preload", is_flag=True, help="Do not import large libraries before the commands run.")
@click.option("--faults", type=click.IntRange(0), default=50, show_default=True, help="Number of faults to print.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each outcome.")
def main(
    samples: Path | None,
    jobs: int,
    limit: float,
    no_preload: bool,
    faults: int,
    as_json: bool,
    **choice: Any,
) -> None:
    """Edit every field of every file, and check that commands refuse the edited file with one line of error.

    The exit code is 1 if a command accepted wrong content, or refused an unchanged file. The exit code is also 1 if a
    command printed a traceback, several lines of error or control characters. A command that exceeded the time limit,
    used more than 1 GB of memory, or changed files also gives exit code 1.

    \b
    Example:
      python -m tools.edit_files --jobs 2
      python -m tools.edit_files --only run/run.json --share 0.1
    """
    with tempfile.TemporaryDirectory(prefix="edit-files-") as folder:
        if samples is None:
            samples = Path(folder, "samples")
            command = [sys.executable, "-m", "tools.edits.samples", str(samples)]
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                raise click.ClickException(f"the examples could not be made: {made.stderr.strip()[-500:]}")
        # With ALEXNET_STORE, commands would not read the path of the store from run.json.
        os.environ.pop("ALEXNET_STORE", None)
        import_modules(large=not no_preload)
        use_small_networks()
        chosen = jobs_of(samples.resolve(), Choice(**choice))
        if not chosen:
            raise click.ClickException("The options select no edit. Leave out --only, --kind or --command.")
        outcomes = []
        with progress("editing", sum(len(commands) for _, _, commands in chosen), "commands") as counter:
            for outcome in map(judged, run_jobs(chosen, samples.resolve(), jobs, limit)):
                outcomes.append(outcome)
                counter.advance()
                if as_json:
                    print_json(asdict(outcome))
    failed = [outcome for outcome in outcomes if outcome.verdict not in (ONE_LINE, ACCEPTED)]
    if not as_json:
        for outcome in failed[:faults]:
            field = f"{outcome.file} {outcome.field}".strip()
            print_line(f"{outcome.verdict}: {field}: {outcome.kind}: {outcome.command}: {outcome.text}")
        for line in table_lines(outcomes):
            print_line(line)
        slowest, largest = max(o.seconds for o in outcomes), max(o.memory_mb for o in outcomes)
        print_line(
            f"{count_noun(len(chosen), 'edit')}, {count_noun(len(outcomes), 'command')}; slowest {slowest:.1f} s, "
            f"largest memory {largest:,} MB; {count_noun(len(failed), 'fault')}"
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None
