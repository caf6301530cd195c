"""Program for torchrun: `alextrain` with a small network in place of alexnet."""

from __future__ import annotations

from tests.helpers.small_training import SMALL_ALEXNET
from train.cli import main
from train.config.architecture import ARCHITECTURES

ARCHITECTURES["alexnet"] = SMALL_ALEXNET

if __name__ == "__main__":
    main(prog_name="alextrain")
