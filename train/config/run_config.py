"""Configuration of one run: the settings that `alextrain run` takes from its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prep.console import WrongArgument, count_noun
from train.config.architecture import ALEXNET, Architecture
from train.config.choices import CHECKPOINTS_KEPT
from train.config.devices import Devices
from train.config.recipe import Recipe


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run.

    The fields `store` to `accumulate` must be unchanged when the run continues from a checkpoint
    (train/config/identity.py). `run_dir` and the fields after `run_dir` can change.
    """

    store: Path
    recipe: Recipe
    batch_size: int  # number of images in a step, over all replicas
    seed: int = 0  # seed of the initial parameters and of dropout
    stream_seed: int | None = None  # seed of the training stream: record order, crops and colour noise; None: `seed`
    model: Architecture = ALEXNET
    precision: str = "fp32"  # one of PRECISIONS (train/model/precision.py)
    accumulate: int = 1  # number of equal parts of a replica's batch, which are computed one after the other

    run_dir: Path = Path("run")
    devices: Devices = ("cpu", "cpu")  # device of column 0 and device of column 1
    epochs: int = 1
    steps: int | None = None  # the training ends after this step, counted from 1, unless the last epoch ends earlier
    log_every: int = 20  # number of steps between two lines of metrics.jsonl
    checkpoint_every: int = 1000  # number of steps between two checkpoints; each epoch also ends with one
    keep: int = CHECKPOINTS_KEPT  # number of newest checkpoints to keep, in addition to the best checkpoint
    deterministic: bool = False  # whether a GPU computes the same bits in every run (train/trainer/determinism.py)
    threads: int | None = None  # number of CPU threads that decode and augment; None: one for each usable core
    replicas: int = 1  # number of replicas that compute a step together (train/replicas)
    service: str | None = None  # service that decodes the images: NAME or NAME@HOST:PORT; None: this process decodes
    # What happens if the service is lost. "local": this process decodes; None: the run fails.
    service_fallback: str | None = None

    @property
    def seed_of_stream(self) -> int:
        """The seed of the training stream: `stream_seed`, or `seed` if `stream_seed` is None."""
        return self.seed if self.stream_seed is None else self.stream_seed


def check_parts(config: RunConfig) -> None:
    """Raise UserError if the batch cannot be divided among the replicas, and then into `accumulate` equal parts."""
    share, replicas = config.batch_size // config.replicas, config.replicas
    if config.batch_size % replicas:
        raise WrongArgument(
            f"--batch {config.batch_size}: a step of {config.batch_size} images cannot be divided equally among "
            f"{replicas} replicas. Pass --batch {max(share, 1) * replicas} or {(share + 1) * replicas}, or start "
            f"{_joined_by_or(_divisors(config.batch_size))} replicas."
        )
    if replicas > 1 and share % config.accumulate:
        raise WrongArgument(
            f"--accumulate {config.accumulate}: each of {replicas} replicas takes {count_noun(share, 'image')} of a "
            f"step, which cannot be divided into {config.accumulate} equal parts. "
            f"Pass {_joined_by_or(_divisors(share))}, or another --batch."
        )
    if config.batch_size % config.accumulate:
        divisors = _divisors(config.batch_size)
        raise WrongArgument(
            f"--accumulate {config.accumulate}: a batch of {config.batch_size} cannot be divided into "
            f"{config.accumulate} equal parts. Pass one of {', '.join(map(str, divisors))}, or another --batch."
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _joined_by_or(numbers: list[int]) -> str:
    """Return the numbers as text, such as `1, 2, 4 or 8`."""
    texts = [str(number) for number in numbers]
    return " or ".join([", ".join(texts[:-1])] * (len(texts) > 1) + texts[-1:])
