"""Ablations: variants of the network with one part removed or replaced.

`rise_top1` and `rise_top5` are the increases of the error that the paper's authors report for an ablation. In the
texts of `source`, "net #147: 41.06 / 18.51 %" means network 147 of the authors' code, with its top-1 and top-5 errors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ablation:
    """One ablation: the settings that remove or replace one part of the network."""

    name: str
    source: str
    settings: tuple[str, ...] = ()  # recipe overrides in the syntax of `--set`
    model: str = "alexnet"  # name of the architecture: a key of ARCHITECTURES
    rise_top1: float | None = None  # reported increase of the top-1 error, in percentage points; None: not reported
    rise_top5: float | None = None  # reported increase of the top-5 error, in percentage points; None: not reported


BASELINE = Ablation("baseline", "the network with all its parts")

ABLATIONS = (
    BASELINE,
    Ablation(
        "no-lrn",
        "section 3.3; net #148: 42.03 / 19.36 %, baseline net #145: 40.66 / 18.21 %",
        ("lrn=none", "within_map=none"),
        rise_top1=1.4,
        rise_top5=1.2,
    ),
    Ablation(
        "pool-2",
        "section 3.4; net #147: 41.06 / 18.51 %",
        ("pool_px=2",),
        rise_top1=0.4,
        rise_top5=0.3,
    ),
    Ablation(
        "no-dropout",
        "section 4.2: 'without dropout, our network exhibits substantial overfitting', without a number",
        ("dropout=0",),
    ),
    Ablation(
        "no-colour",
        "section 4.1: the noise 'reduces the top-1 error rate by over 1%'",
        ("augmentation.colour=off", "augmentation.divisor=1"),
        rise_top1=1.0,
    ),
    Ablation(
        "no-crossing",
        "net #150: 41.83 / 19.33 %, with wider columns (160 maps in conv2, 4096 units each); not in the paper",
        ("crossing=false",),
        rise_top1=1.17,
        rise_top5=1.12,
    ),
    Ablation(
        "one-gpu",
        "section 3.2: half as many kernels on one GPU; net #145-half, ILSVRC-2010: 39.17 / 18.23 %",
        model="one-gpu",
        rise_top1=1.7,
        rise_top5=1.2,
    ),
    Ablation(
        "tanh",
        "section 3.1, figure 1: tanh takes six times as many epochs as ReLU to 25 % training error (CIFAR-10, four "
        "layers)",
        ("activation=tanh",),
    ),
)
