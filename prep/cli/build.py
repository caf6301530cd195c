"""`alexprep build-lmdb` and `alexprep import-caffe`: commands that write a store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.build.report import report_build, report_estimate, report_part
from prep.cli.options import allow_empty_option, make_runner, path_for, record_options, split_option
from prep.cli.part import command_line, parse_part
from prep.console import UserError, WrongArgument, progress, store_option
from prep.inputs.formats import LAYOUTS
from prep.inputs.labels import LABEL_ORDERS
from prep.store.manifest import DEFAULT_BACKGROUND, SPLITS, Settings, Store

MAX_DECODED = 5000  # --dry-run without --decode decodes all photographs if there are at most this many

if TYPE_CHECKING:  # run-time imports would load LMDB and Pillow, even for --help
    from prep.build.parts import Part
    from prep.build.plan import BuildPolicy
    from prep.inputs.formats.layouts import SplitSource
    from prep.inputs.reader import ListOptions, Source
    from prep.workers import Runner


@click.command("build-lmdb")
@click.argument("source", type=click.Path(path_type=Path))
@store_option
@click.option("--split", type=click.Choice(SPLITS), help="Split to build.  [default: every split found in SOURCE]")
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Label file of images without class folders: `name label` on each line, with blanks, tabs or commas between "
    "them, or one number on each line (ILSVRC's ground truth).  [default: the label file beside the images]",
)
@click.option(
    "--label-order",
    type=click.Choice(LABEL_ORDERS),
    help="Meaning of number k in a label file: the k-th class in sorted order, counted from 1 (sorted) or from 0 "
    "(sorted-from-0), the class with the name k (name), or the class with ILSVRC2012_ID k in the devkit (devkit).  "
    "[default: devkit for a file of numbers without names; for other files, the only meaning that is possible]",
)
@click.option(
    "--devkit",
    type=click.Path(path_type=Path),
    help="ILSVRC's devkit: ILSVRC2012_devkit_t12.tar.gz, its unpacked folder or its meta.mat.  [default: the devkit "
    "beside the label file or the images]",
)
@click.option(
    "--classes",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the names of the classes, one on each line in the order of the labels. If the file names only some "
    "of the classes of SOURCE, photographs of the other classes are left out.  [default: the order of the store, else "
    "sorted by name; names that are numbers are sorted as numbers]",
)
@allow_empty_option
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    help="Layout of SOURCE; the page `Your own data` of the documentation describes each layout.  "
    "[default: recognized from names and first bytes]",
)
@click.option(
    "--exclude",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File that names photographs to leave out, one on each line: a path, a name with or without its extension, or "
    "the number in a file name (36 for ILSVRC2012_val_00000036.JPEG).",
)
@click.option(
    "--extra",
    multiple=True,
    metavar="FIELD[:TYPE]=CSV",
    help="CSV file with a further label of each image, such as age=ages.csv. The first row names the columns. One "
    "column has the paths of the images. The column FIELD has the values. Without a column FIELD, all other columns "
    "have the values. TYPE is int, float, vector (several columns of numbers) or text. May be given several times.  "
    "[default of TYPE: the type that the values have]",
)
@click.option("--follow-links", is_flag=True, help="Follow symbolic links that lead out of SOURCE.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Make all checks of the build and print bad inputs, needed disk space and build time, but build nothing.",
)
@click.option(
    "--decode",
    type=click.Choice(("all", "sample")),
    help="Photographs that --dry-run decodes: all (finds the same bad inputs and warnings as the build, and takes "
    "nearly as long), or a sample of about 30 of each split.  [default: all if SOURCE has at most "
    f"{MAX_DECODED:,} photographs, else a sample]",
)
@click.option(
    "--part",
    metavar="I/N",
    help="Build only part I of N: every N-th shard, beginning with the I-th shard. I counts from 1. Parts may run in "
    "any order and on different machines; the part that ends last completes the store.",
)
@record_options
def build_lmdb(
    source: Path,
    store: Path,
    split: str | None,
    labels: Path | None,
    label_order: str | None,
    devkit: Path | None,
    classes: Path | None,
    allow_empty_classes: bool,
    layout: str | None,
    exclude: Path | None,
    extra: tuple[str, ...],
    follow_links: bool,
    dry_run: bool,
    decode: str | None,
    part: str | None,
    jobs: int | None,
    cluster: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Rescale the images of SOURCE and write them to a sharded LMDB store.

    A split is a folder with one folder for each class, a flat folder of images with a label file, or a tar or zip
    archive of such a folder (for example ILSVRC2012_img_train.tar). SOURCE is one split, or a folder that contains the
    splits train and val. SOURCE can also be a folder of class tars, Tiny ImageNet, Kaggle's ILSVRC, WebDataset shards,
    Parquet files of Hugging Face, or a CSV file of paths and labels (see --layout). Nothing in SOURCE is changed. After
    an interruption the same command resumes the build. With --extra, the command also adds fields to a finished store,
    without building its records again.

    Several machines can share the work: with --cluster on a Ray cluster, or with --part as separate commands, such as
    the tasks of a SLURM array. All machines must see SOURCE and the store at the same paths.

    \b
    Example:
      alexprep build-lmdb /data/ilsvrc --store store
      alexprep build-lmdb /data/ilsvrc --store store --dry-run
      alexprep build-lmdb /data/val --split val --devkit /data/ILSVRC2012_devkit_t12.tar.gz
      alexprep build-lmdb /data/photos --labels /data/labels.csv --classes /data/classes.txt
      alexprep build-lmdb /data/photos --extra age=/data/ages.csv --extra caption:text=/data/captions.csv
      alexprep build-lmdb /nfs/ilsvrc --store /nfs/store --cluster auto
      alexprep build-lmdb /nfs/ilsvrc --store /nfs/store --part 3/16
    """
    chosen_part = parse_part(part, cluster, dry_run, options["restart"])
    if decode is not None and not dry_run:
        raise WrongArgument(f"--decode {decode} is for --dry-run: a build decodes all photographs. Leave out --decode.")
    source, store = path_for(cluster, source), path_for(cluster, store)
    with make_runner(cluster, jobs, preload="prep.build.shard_task") as workers:
        from prep.build.split_checks import check_splits, check_store_folder
        from prep.extra.csv_values import parse_extra
        from prep.extra.match import with_extra
        from prep.inputs.reader import ListOptions
        from prep.inputs.selection import ExclusionList
        from prep.inputs.sources import find_splits

        settings, policy = _settings_and_policy(options, store, allow_empty_classes)
        excluded = ExclusionList(exclude) if exclude else None
        list_options = ListOptions(labels, label_order, devkit, classes, allow_empty_classes, follow_links, excluded)
        extra_options = parse_extra(extra)
        check_store_folder(store)
        found = find_splits(source, split, layout)
        sources = with_extra(_list_splits(found, list_options, store, policy.restart), extra_options)
        if excluded is not None:
            excluded.report_unused()
        if dry_run:
            _dry_run(sources, store, settings, workers, policy, decode, as_json)
            return
        check_splits(sources, store, settings, workers, policy, with_space=chosen_part is None)
        for inputs in sources:
            if chosen_part:
                command = command_line(click.get_current_context())
                _build_part(inputs, store, settings, workers, policy, chosen_part, command, as_json)
            else:
                _build(inputs, store, settings, workers, policy, as_json)


def _list_splits(found: Mapping[str, SplitSource], options: ListOptions, store: Path, restart: bool) -> list[Source]:
    """List the inputs of all splits.

    All splits have the same classes: those of the store, of an unfinished build in the store, or of the first split.
    Raises WrongArgument if --labels is given, but no split gets its labels from this file.
    """
    from prep.build.resume import begun_classes
    from prep.inputs.sources import list_source

    built = _store_classes(store)
    begun = () if built else begun_classes(store, [name for name in SPLITS if not (restart and name in found)])
    known_classes, sources = built or begun, []
    for name, where in found.items():
        try:
            sources.append(list_source(where, name, options, known_classes))
        except UserError as error:
            if begun and not built:
                raise UserError(f"{error} The store holds an unfinished build; --restart discards it.") from error
            raise
        known_classes = known_classes or sources[0].classes
    if options.labels is not None and all(source.labels_from is None for source in sources):
        raise WrongArgument(
            f"--labels {options.labels}: class folders, or the files themselves, give the labels of "
            f"{' and '.join(found)}, so this file would not be used. Leave out --labels."
        )
    return sources


def _dry_run(
    sources: Sequence[Source],
    store: Path,
    settings: Settings,
    runner: Runner,
    policy: BuildPolicy,
    decode: str | None,
    as_json: bool,
) -> None:
    """Print estimates for all splits. Raises the error that a build of these splits would raise.

    `decode` is the value of --decode. None stands for `all` if there are at most MAX_DECODED inputs, else for `sample`.
    """
    from prep.build.split import estimate_build
    from prep.build.split_checks import compare_splits, refuse_estimates

    compare_splits(sources)
    count = sum(len(source.inputs) for source in sources)
    decode = decode or ("all" if count <= MAX_DECODED else "sample")
    estimates = []
    for source in sources:
        if decode == "all":
            with progress(f"{source.split}: decoding", len(source.inputs), "pictures") as decode_progress:
                estimates.append(estimate_build(source, store, settings, runner, policy, decode_progress))
        else:
            estimates.append(estimate_build(source, store, settings, runner, policy))
    for source, estimate in zip(sources, estimates, strict=True):
        report_estimate(estimate, source, settings.background, as_json)
    refuse_estimates(sources, estimates, store, runner.jobs, policy)


def _settings_and_policy(
    options: dict[str, Any], store: Path, allow_empty_classes: bool = False
) -> tuple[Settings, BuildPolicy]:
    from prep.build.limits import InputLimits
    from prep.build.plan import BuildPolicy
    from prep.build.resume import background_of

    settings = Settings(
        side_px=options["side"],
        keep_aspect=options["keep_aspect"],
        format=options["format"],
        quality=options["quality"],
        filter=options["filter"],
        seed=options["seed"],
        background=options["background"] or background_of(store, options["restart"]) or DEFAULT_BACKGROUND,
        reduce_above=options["reduce_above"],
    )
    limits = InputLimits(options["max_pixels"], options["on_warning"] == "keep", options["time_limit"])
    skip_bad = options["on_bad"] == "skip" or options["max_bad"] is not None
    return settings, BuildPolicy(skip_bad, options["max_bad"], options["restart"], allow_empty_classes, limits)


def _store_classes(store: Path) -> tuple[str, ...]:
    """Return the classes of a store; empty if the store has no complete split yet."""
    return Store.open(store).classes if (store / "manifest.json").exists() else ()


def _build(source: Source, store: Path, settings: Settings, runner: Runner, policy: BuildPolicy, as_json: bool) -> None:
    from prep.build.split import build_split

    started = time.monotonic()
    before = Store.open(store).splits if (store / "manifest.json").exists() else {}
    with progress(f"{source.split}: rescaling", len(source.inputs), "pictures") as build_progress:
        built = build_split(source, store, settings, runner, build_progress, policy)
    done = build_progress.done - build_progress.skipped
    text = ""
    if source.split in before:
        new = sorted(built.split(source.split).extra.keys() - before[source.split].extra.keys())
        text = f"  added the extra fields {', '.join(new)}; no record was built again" if new else ""
    report_build(built, source.split, done, time.monotonic() - started, as_json, text)


def _build_part(
    source: Source,
    store: Path,
    settings: Settings,
    runner: Runner,
    policy: BuildPolicy,
    part: Part,
    command: str,
    as_json: bool,
) -> None:
    from prep.build.parts import build_part

    started = time.monotonic()
    inputs = part.count_inputs(len(source.inputs))
    with progress(f"{source.split}: rescaling part {part}", inputs, "pictures") as build_progress:
        result = build_part(source, store, settings, runner, build_progress, policy, part, command)
    seconds = time.monotonic() - started
    report_part(result, part, store, source.split, inputs - build_progress.skipped, seconds, as_json)


@click.command("import-caffe")
@click.argument("lmdbs", nargs=-1, required=True, metavar="LMDB...", type=click.Path(path_type=Path))
@store_option
@split_option
@click.option(
    "--classes",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the names of the classes, one on each line in the order of the labels (synset_words.txt).  "
    "[default: the classes of the store, else the folder names in the keys, else numbers]",
)
@allow_empty_option
@record_options
def import_caffe(
    lmdbs: tuple[Path, ...],
    store: Path,
    split: str,
    classes: Path | None,
    allow_empty_classes: bool,
    jobs: int | None,
    cluster: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Build a split from LMDBs that Caffe's convert_imageset wrote.

    Encoded images and bare pixels (C,H,W, blue first) go through the same steps as image files. The labels in the LMDBs
    are kept. Prefer the original images to such LMDBs, because the resizing and compression of convert_imageset cannot
    be undone.

    \b
    Example:
      alexprep import-caffe ilsvrc12_train_lmdb --store store --classes synset_words.txt
      alexprep import-caffe ilsvrc12_val_lmdb --store store --split val
    """
    from prep.build.plan import tool_versions
    from prep.build.split_checks import check_store_folder
    from prep.inputs.caffe import list_caffe_lmdbs

    store, lmdbs = path_for(cluster, store), tuple(path_for(cluster, path) for path in lmdbs)
    check_store_folder(store)
    settings, policy = _settings_and_policy(options, store, allow_empty_classes)
    with make_runner(cluster, jobs, preload="prep.build.shard_task") as workers:
        workers.check_machines(None, lmdbs[0], tool_versions)
        with progress(f"{split}: listing", 0, "records") as listing_progress:
            inputs = list_caffe_lmdbs(
                lmdbs, split, classes, _store_classes(store), workers, listing_progress, allow_empty_classes
            )
        _build(inputs, store, settings, workers, policy, as_json)
