"""`alexprep build-lmdb` and `import-caffe`: write a store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.build.report import report_build, report_forecast
from prep.cli.options import record_options, split_option
from prep.console import (
    progress,
    store_option,
    usable_cores,
)
from prep.store.manifest import SPLITS, Settings, Store

if TYPE_CHECKING:
    from prep.build.split import Policy
    from prep.inputs.reader import Source
    from prep.workers import Runner


@click.command("build-lmdb")
@click.argument("source", type=click.Path(path_type=Path))
@store_option
@click.option("--split", type=click.Choice(SPLITS), help="Which split to build.  [default: each that SOURCE has]")
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Labels of a flat folder: `name label` a line, or ILSVRC's ground truth, one number a line.",
)
@click.option(
    "--label-order",
    type=click.Choice(["sorted", "devkit"]),
    help="What number k of a ground truth means: k-th class name in sorted order, or as the devkit's meta.mat "
    "beside it says.  [default: devkit where meta.mat is there]",
)
@click.option("--follow-links", is_flag=True, help="Take symbolic links that lead out of SOURCE.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, how long and how large; build nothing.")
@record_options
def build_lmdb(
    source: Path,
    store: Path,
    split: str | None,
    labels: Path | None,
    label_order: str | None,
    follow_links: bool,
    dry_run: bool,
    jobs: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Rescale the photographs of SOURCE into a sharded LMDB store.

    SOURCE is a folder with a folder for each class, or a flat folder of photographs with --labels, or a tar archive of
    either (ILSVRC2012_img_train.tar as it is), or holds such as train and val. It is only read. A build that was
    interrupted goes on when the same command is given again.

    \b
    Example:
      alexprep build-lmdb /data/ilsvrc --store store
      alexprep build-lmdb /data/ilsvrc --store store --dry-run
      alexprep build-lmdb /data/val --split val --labels /data/ILSVRC2012_validation_ground_truth.txt
    """
    from prep.workers import WorkerPool

    with WorkerPool(jobs or usable_cores(), preload="prep.build.shard_task") as workers:
        from prep.build.split import forecast
        from prep.inputs.sources import find_splits, list_source

        settings, policy = _settings_and_policy(options)
        for name, path in find_splits(source, split).items():
            found = list_source(path, name, labels, label_order, _known(store), follow_links)
            if dry_run:
                report_forecast(forecast(found, store, settings, workers, policy), name, as_json)
            else:
                _build(found, store, settings, workers, policy, as_json)


def _settings_and_policy(options: dict[str, Any]) -> tuple[Settings, Policy]:
    from prep.build.split import Policy

    settings = Settings(
        options["side"],
        options["keep_aspect"],
        options["format"],
        options["quality"],
        options["filter"],
        options["seed"],
    )
    skip_bad = options["on_bad"] == "skip" or options["max_bad"] is not None
    return settings, Policy(skip_bad, options["max_bad"], options["restart"])


def _known(store: Path) -> tuple[str, ...]:
    """The classes of a store, none where it is not there yet."""
    return Store.open(store).classes if (store / "manifest.json").exists() else ()


def _build(source: Source, store: Path, settings: Settings, workers: Runner, policy: Policy, as_json: bool) -> None:
    from prep.build.split import build_split

    started = time.monotonic()
    with progress(f"{source.split}: rescaling", len(source.inputs), "pictures") as report:
        built = build_split(source, store, settings, workers, report, policy)
    report_build(built, source.split, report.done - report.skipped, time.monotonic() - started, as_json)


@click.command("import-caffe")
@click.argument("lmdbs", nargs=-1, required=True, metavar="LMDB...", type=click.Path(path_type=Path))
@store_option
@split_option
@click.option(
    "--classes",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Names of the classes, one a line in the order of the labels (synset_words.txt).",
)
@record_options
def import_caffe(
    lmdbs: tuple[Path, ...],
    store: Path,
    split: str,
    classes: Path | None,
    jobs: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a split of the Datums in LMDBs that Caffe's convert_imageset wrote.

    Encoded pictures and bare pixels (C,H,W, blue first) are taken through the same steps as photographs; labels stay
    what they are. What Caffe's tool has squashed or compressed stays so: from the photographs a better store is made.

    \b
    Example:
      alexprep import-caffe ilsvrc12_train_lmdb --store store --classes synset_words.txt
      alexprep import-caffe ilsvrc12_val_lmdb --store store --split val
    """
    from prep.inputs.caffe import list_caffe_lmdbs
    from prep.workers import WorkerPool

    settings, policy = _settings_and_policy(options)
    with WorkerPool(jobs or usable_cores(), preload="prep.build.shard_task") as workers:
        with progress(f"{split}: listing", 0, "records") as report:
            found = list_caffe_lmdbs(lmdbs, split, classes, _known(store), workers, report)
        _build(found, store, settings, workers, policy, as_json)
