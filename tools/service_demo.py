"""Demo of `alexstream serve`: kills a node during training, and compares the weights with those of an undisturbed run.

    python -m tools.service_demo

The demo makes a small store, and starts a Ray cluster on this machine: a head node without cores, and two nodes with
one core each. A service runs one worker on each of the two nodes. Two `alextrain run` commands read their batches from
the service. The `alextrain run` commands have different seeds, the same stream seed, and no --service-fallback. In the
middle of the training, the demo kills all processes of one node at once, as a power failure does. At the end, the demo
trains both runs again without the service, and compares the results with and without the service. Weights, velocity,
state and metrics must have the same bits.

The exit code is 0 if all results are equal, and 1 if a result differs or a command fails. The demo takes a few minutes
on two cores, and needs 1 GB of disk space in the temporary folder. The demo needs the pip extra `cluster`.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from prep.cluster import connected, ray_module
from prep.console import CONTEXT_SETTINGS, UserError, count_noun, print_json, say
from tools.demo_processes import LIMIT_S, cluster_of_nodes, running, script, wait_for_trainers, wait_until
from tools.tree_bits import run_hashes

SERVICE = "demo"
SEEDS, STREAM_SEED = (1, 2), 7
PHOTOGRAPHS, BATCH = 120, 8  # 120 photographs give 100 training images, and an epoch has 12 steps
RUNS = ("service", "alone")  # the run folders are service-1, service-2, alone-1 and alone-2


class Clock:
    """Prints what the demo does, with the time since the start of the demo."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start of the demo."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Print a line that begins with the time since the start."""
        say(f"{self.seconds:6.1f} s  {text}")


def make_store(folder: Path) -> Path:
    """Build the store of the demo in `folder`. Raises UserError if the build fails."""
    from tools.photo_digits import make_dataset

    store = folder / "store"
    make_dataset(folder / "photographs", limit=PHOTOGRAPHS)
    command = [str(script("alexprep")), "build-lmdb", str(folder / "photographs"), "--store", str(store)]
    command.append("--allow-empty-classes")  # the few validation photographs do not show every digit
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UserError(f"alexprep build-lmdb ended with exit code {ended.returncode}: {ended.stderr.strip()[-500:]}")
    return store


def commands(store: Path, folder: Path, name: str, steps: int, *more: str) -> list[tuple[Path, list[str]]]:
    """Return (run folder, options of `alextrain run`) for each seed.

    The name of the folder is NAME-SEED. `more` are options to add.
    """
    common = [
        *("--store", str(store), "--gpus", "cpu", "--model", "half", "--recipe", "short", "--batch", str(BATCH)),
        *("--steps", str(steps), "--keep", "1", "--stream-seed", str(STREAM_SEED), *more),
    ]
    return [(folder / f"{name}-{seed}", [*common, "--seed", str(seed)]) for seed in SEEDS]


def train_with_service(store: Path, folder: Path, steps: int, seed: int, clock: Clock) -> dict[str, Any]:
    """Train both runs on a service, and kill a node during the training.

    Returns the name of the killed node, and the steps of the runs at the time of the kill. Also returns the status of
    the service before the kill, after the kill and at the end.
    """
    from pipeline.service.control import make_config, service_status, start_service, stop_service

    with ExitStack() as stack:
        # Ray prints the death of a node to the standard output of every connected program.
        stack.enter_context(redirect_stdout(stack.enter_context((folder / "ray.log").open("w"))))
        clock.say("start a Ray cluster: a head node without cores, and two nodes")
        cluster, started = stack.enter_context(cluster_of_nodes(2))
        nodes = {node.node_id: node for node in started}
        ray = stack.enter_context(connected(cluster.address))
        names = {node: f"node {number}" for number, node in enumerate(nodes, 1)}

        def status() -> dict[str, Any]:
            return service_status(ray, SERVICE, cluster.address)

        clock.say("start a service with two workers")
        config = make_config(store, SERVICE, len(nodes), len(nodes), 1, consumers=len(SEEDS))
        coordinator = start_service(ray, config)
        wait_until(lambda: set(worker_nodes(status())) == set(names), "a worker on each node")
        clock.say(status_text(status(), names))

        find_node = coordinator.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
        node, kill_step = choose_kill(seed, steps, list(nodes), ray.get(find_node, timeout=LIMIT_S))

        clock.say(f"start two trainers on the service: seeds {SEEDS[0]} and {SEEDS[1]}, one stream seed")
        at = commands(store, folder, "service", steps, "--service", f"{SERVICE}@{cluster.address}")
        trainers = stack.enter_context(running(at))
        wait_until(lambda: any(trainer.ended() or trainer.step >= kill_step for trainer in trainers), "the kill's step")
        before = status()
        clock.say(status_text(before, names))
        cluster.remove_node(nodes[node], allow_graceful=False)
        reached = [trainer.step for trainer in trainers]
        clock.say(f"{names[node]} killed; the trainers are at steps {reached[0]} and {reached[1]} of {steps}")
        wait_until(lambda: node not in worker_nodes(status()), "the service notices the killed node")
        after = status()
        clock.say(status_text(after, names))
        wait_for_trainers(trainers)
        end = status()
        clock.say(f"both trainers have ended; {status_text(end, names)}")
        stop_service(ray, SERVICE, cluster.address)
    killed = {"node": names[node], "chosen_step": kill_step, "steps": reached}
    return {"killed": killed, "before": before, "after": after, "end": end}


def choose_kill(seed: int, steps: int, nodes: Sequence[str], coordinator_node: str) -> tuple[str, int]:
    """Choose the node to kill, and the training step of the kill, in the middle third of all steps.

    The node of the coordinator is not chosen. The service would survive the loss of this node, but the new coordinator
    would count images and retries from zero.
    """
    chance = random.Random(seed)
    return (
        chance.choice([node for node in nodes if node != coordinator_node]),
        chance.randint(max(1, steps // 3), max(1, 2 * steps // 3)),
    )


def worker_nodes(status: Mapping[str, Any]) -> list[str]:
    """Return Ray's id of the node of each worker."""
    return [worker["node"] for worker in status["workers"]]


def status_text(status: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the state of a service in one line. `names` is {Ray's id of a node: name of the node}."""
    nodes = " and ".join(sorted(names[node] for node in worker_nodes(status)))
    return (
        f"{count_noun(len(status['workers']), 'worker')}{f' on {nodes}' if nodes else ''}, {status['starting']} "
        f"starting; {count_noun(len(status['consumers']), 'consumer')}; "
        f"{count_noun(status['images_made'], 'image')} decoded; "
        f"{count_noun(status['retries'], 'batch', 'batches')} made again"
    )


def train_alone(store: Path, folder: Path, steps: int) -> None:
    """Train both runs without a service."""
    with running(commands(store, folder, "alone", steps)) as trainers:
        wait_for_trainers(trainers)


def compare_runs(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each result of each run: digests with and without the service, and True for equal digests."""
    rows = []
    for seed in SEEDS:
        service, alone = (run_hashes(folder / f"{name}-{seed}") for name in RUNS)
        for name in dict.fromkeys([*service, *alone]):
            digests = {"service": service.get(name), "alone": alone.get(name)}
            rows.append({"seed": seed, "result": name, **digests, "equal": service.get(name) == alone.get(name)})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `compare_runs` as text, with the first 12 digits of the digests."""
    width = max(len(row["result"]) for row in rows)
    lines = [f"seed  {'result':<{width}}  {'with service':<12}  {'without':<12}"]
    for row in rows:
        digests = "  ".join(f"{(row[name] or 'missing')[:12]:<12}" for name in RUNS)
        lines.append(
            f"{row['seed']:>4}  {row['result']:<{width}}  {digests}  {'equal' if row['equal'] else 'DIFFERENT'}"
        )
    return "\n".join(lines)


def images_of_a_run(store: Path, folder: Path) -> int:
    """Return the number of images that each run received for training and validation.

    Both runs receive the same images.
    """
    from prep.store.manifest import Store
    from train.runs.run_dir import read_metrics  # loads NumPy, which --help does not need

    kinds = [line["kind"] for line in read_metrics(folder / f"service-{SEEDS[0]}")]
    return kinds.count("train") * BATCH + kinds.count("val") * Store.open(store).split("val").records


def run_demo(folder: Path, steps: int, seed: int) -> dict[str, Any]:
    """Run the demo in a folder. Returns the object that --json prints. Raises UserError if a command fails."""
    ray_module()
    clock = Clock()
    clock.say(f"make a store of {PHOTOGRAPHS} photographs")
    store = make_store(folder)
    result = train_with_service(store, folder, steps, seed, clock)
    clock.say("train both runs again, without the service")
    train_alone(store, folder, steps)
    rows = compare_runs(folder)
    clock.say("both runs are trained and compared")
    return {
        "equal": all(row["equal"] for row in rows),
        "results": rows,
        **result,
        "images_of_a_run": images_of_a_run(store, folder),
        "seconds": round(clock.seconds, 1),
    }


def result_text(result: Mapping[str, Any]) -> str:
    """Return the table of results, a line with the number of differences, and a line with the numbers of images."""
    rows, images, decoded = result["results"], result["images_of_a_run"], result["end"]["images_made"]
    different = sum(not row["equal"] for row in rows)
    return (
        f"{table(rows)}\n{len(rows)} results: {f'{different} different' if different else 'all equal'}.\n"
        f"Each of the two runs received {images:,} images. The service decoded {decoded:,}: {images:,} once for both "
        f"runs, and {decoded - images:,} that were read ahead, or decoded again because they had been lost or dropped."
    )


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _demo_folder(folder: Path | None) -> Iterator[Path]:
    """Create the folder `folder`, or a temporary folder if `folder` is None. Raises UserError if `folder` exists."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="service-demo-") as temporary:
            yield Path(temporary)
        return
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"--folder {folder}: exists. Name a new folder, or delete this folder.") from None
    yield folder.resolve()


@click.command(context_settings=CONTEXT_SETTINGS)
@click.option(
    "--steps",
    type=click.IntRange(3),
    default=24,
    show_default=True,
    metavar="N",
    help="Number of training steps of each run.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of two random choices: the node to kill, and the training step at which the demo kills the node.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    metavar="NEW_DIR",
    help="New folder for the store, the runs and their output.  [default: a temporary folder, which is removed]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def main(steps: int, seed: int, folder: Path | None, as_json: bool) -> None:
    """Train two runs on a service with two nodes, kill one node, and compare the runs with runs without a service.

    The exit code is 0 if weights, states and metrics with and without the service have the same bits, otherwise 1.

    \b
    Example:
      python -m tools.service_demo
      python -m tools.service_demo --seed 3 --steps 40 --json
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _demo_folder(folder) as root:
            result = run_demo(root, steps, seed)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        say("Interrupted. The trainers and the cluster are stopped.")
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        print_json(result)
    else:
        click.echo(result_text(result))
    sys.exit(0 if result["equal"] else 1)


if __name__ == "__main__":
    main()
