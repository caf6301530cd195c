"""`alextrain evaluate`: error rates of a run, or of the averaged probabilities of several runs.

Predictions for different images cannot be averaged (check_same_images in train/evaluation/predictions.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.console import UserError, count_noun, encodable, json_option, print_json, print_line, say
from prep.files import output_file
from prep.store.manifest import Store
from train.cli.options import (
    checkpoint_option,
    precision_option,
    run_store_option,
    service_options,
    threads_option,
    training_gpus_option,
    views_option,
)
from train.cli.replicas import replica_group, replica_timeout_option, set_threads
from train.runs.ensemble_dir import with_members

if TYPE_CHECKING:
    from train.evaluation.evaluate import EvalResult
    from train.evaluation.predictions import Predictions
    from train.replicas.group import ReplicaGroup


@click.command()
@click.argument("runs", metavar="RUN_DIR|FILE.npz...", nargs=-1, required=True, type=click.Path(path_type=Path))
@run_store_option
@views_option
@checkpoint_option
@click.option("--split", default="val", show_default=True, help="Split of the store to evaluate on.")
@click.option(
    "--weights", metavar="W,W,…", help="Weights of the runs in the average, in the order of the runs.  [default: equal]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=output_file(".npz", kind="probabilities are saved as"),
    metavar="FILE.npz",
    help="File for the probabilities, labels and keys of all images.  [default: none]",
)
@training_gpus_option
@threads_option
@replica_timeout_option
@precision_option
@service_options
@json_option
def evaluate(
    runs: tuple[Path, ...],
    store: Path | None,
    views: str,
    checkpoint: str,
    split: str,
    weights: str | None,
    out: Path | None,
    gpus: str | None,
    threads: int | None,
    replica_timeout: float,
    precision: str,
    service: str | None,
    service_fallback: str | None,
    as_json: bool,
) -> None:
    """Measure the error rates of a run on a split. Every image is counted exactly once.

    An argument can also be a file that an earlier command saved with --out, or the folder of an ensemble, which stands
    for all members of the ensemble. For several networks, the command prints the errors of each network. It then
    averages the probabilities of all networks, with the weights of --weights, and prints the errors of this average.
    The paper averages the probabilities of five and of seven networks.

    Under torchrun, each process evaluates a part of the images, and the first process prints the result.

    \b
    Example:
      alextrain evaluate run
      alextrain evaluate run --store store --views 10 --out run.npz
      alextrain evaluate run.npz other.npz third-run --weights 2,1,1
      alextrain evaluate five --views 10 --out five.npz
      alextrain evaluate run --service imagenet
      torchrun --nproc-per-node 4 -m train evaluate run --views 10
    """
    with replica_group(replica_timeout) as group:
        with group.together():
            if store is not None and not all(path.suffix.lower() == ".npz" for path in runs):
                Store.open(store).split(split)  # a missing store is reported before torch is imported
            from train.evaluation.evaluate import average_probabilities, error_rates
            from train.evaluation.paper_table import paper_row
            from train.evaluation.predictions import (
                Predictions,
                check_same_images,
                load_predictions,
                parse_weights,
            )

            runs, given = tuple(with_members(runs)), runs
            is_file = [path.suffix.lower() == ".npz" for path in runs]
            member_weights, names = parse_weights(weights, len(runs)), [str(path) for path in runs]
            last = [path.name for path in runs]
            titles = [str(path) if last.count(path.name) > 1 else path.name for path in runs]
        options: dict[str, Any] = {
            "views": views,
            "checkpoint": checkpoint,
            "split": split,
            "gpus": gpus,
            "threads": set_threads(group, threads),
            "precision": precision,
            "service": service,
            "service_fallback": service_fallback,
        }
        members, results = [], []
        for path, is_saved in zip(runs, is_file, strict=True):
            if not is_saved:
                result, member = _evaluate_run(path, store, group, **options)
            elif group.is_first:
                member = load_predictions(path)
                result = error_rates(average_probabilities([member.probabilities]), member.labels)
            if not group.is_first:
                continue
            members.append(member)
            results.append(result)
            if not as_json:
                _print_result(titles[len(members) - 1] if len(runs) > 1 else "", member.about, result)
            check_same_images(names[: len(members)], members)
        if not group.is_first:
            return
        combined, combined_result, row = members[0], results[0], None
        if len(members) > 1:
            mean = average_probabilities([member.probabilities for member in members], member_weights)
            combined_result = error_rates(mean, combined.labels)
            about = {
                **combined.about,
                "run": [encodable(name) for name in names],
                "step": [member.about["step"] for member in members],
            }
            about |= {key: _common_value(members, key) for key in ("views", "precision")}
            if weights is None:
                row = paper_row(len(members), len(about["classes"]), about["views"], about["split"])
            if runs != given and len({str(step) for step in about["step"]}) > 1:
                steps = ", ".join(f"{title} {step}" for title, step in zip(titles, about["step"], strict=True))
                say(f"The networks have been trained for different numbers of steps: {steps}.")
            combined = Predictions(mean.astype("float32"), combined.labels, combined.keys, about)
            if not as_json:
                title = f"average of {len(members)}" + (f", weights {weights}" if weights else "")
                _print_result(f"{len(runs)} CNNs, {title}" if runs != given else title, about, combined_result)
                if row is not None:
                    print_line(row.text())
        if out is not None:
            combined.save(out)
            say(f"Saved: {out}")
        if as_json:
            each = [_result_json(member, result) for member, result in zip(members, results, strict=True)]
            of_average: dict[str, Any] = {"members": each, "weights": member_weights} if len(each) > 1 else {}
            if row is not None:
                of_average["paper"] = row.as_json()
            print_json({**_result_json(combined, combined_result), **of_average})


def _evaluate_run(
    path: Path,
    store_path: Path | None,
    group: ReplicaGroup,
    *,
    views: str,
    checkpoint: str,
    split: str,
    gpus: str | None,
    threads: int | None,
    precision: str,
    service: str | None,
    service_fallback: str | None,
) -> tuple[EvalResult, Predictions]:
    """Evaluate a checkpoint of the run at `path`, and append the result to the run's evaluations.jsonl.

    Each rank of `group` evaluates a part of the split. On all ranks except rank 0, the Predictions are empty.
    """
    from train.evaluation.predictions import DENSE, predict_split, read_evaluations, record_evaluation
    from train.model.precision import set_precision
    from train.replicas.devices import devices_of_replica
    from train.runs.loading import load_trained, run_and_checkpoint
    from train.runs.run_dir import has_description, read_description
    from train.runs.training_store import find_store, missing_store_text, saved_store_path

    with group.together():
        devices = devices_of_replica(gpus, 2, group)
        set_precision(precision, devices)  # an unsupported precision is refused before the network is loaded
        run_dir, which = run_and_checkpoint(path, checkpoint)
        network, loaded = load_trained(run_dir, devices, which)
        if group.is_first:
            read_evaluations(run_dir)  # a damaged file is reported before the evaluation
        store = find_store(run_dir, loaded, store_path)
        if store is None:
            raise UserError(missing_store_text(run_dir, saved_store_path(read_description(run_dir))))
        fingerprint = store.split(split).fingerprint
        if "train" not in store.splits or loaded.identity["store_fingerprint"] != store.split("train").fingerprint:
            say(f"The mean of {store.root} is subtracted from the images, not the mean of the training store.")
    with group.together():
        check_same_inputs(group, {"checkpoint": loaded.digest, f"split {split}": fingerprint})
    count = views if views == DENSE else int(views)
    result, predictions = predict_split(
        network,
        loaded,
        store,
        split,
        count,
        precision,
        str(path),
        threads=threads,
        service=service,
        service_fallback=service_fallback,
        group=group,
    )
    if group.is_first and has_description(run_dir):  # a checkpoint file outside of a run folder has no run.json
        record_evaluation(run_dir, predictions.about, result)
    return result, predictions


def check_same_inputs(group: ReplicaGroup, digests: dict[str, str]) -> None:
    """Raise UserError if the digest of the checkpoint or of the split differs between a rank and rank 0."""
    of_ranks = group.gather_json(digests)
    for rank, of_rank in enumerate(of_ranks):
        for name, digest in of_rank.items():
            if digest != of_ranks[0][name]:
                raise UserError(
                    f"rank {rank} of {group.size} has read another {name} than rank 0 (digest {digest[:12]}, rank 0: "
                    f"{of_ranks[0][name][:12]}). Give all machines the same files. If the run is still training, wait "
                    "until it ends, or name a file: --checkpoint FILE."
                )


def _common_value(members: list[Predictions], key: str) -> Any:
    """Return the value of `about[key]` if it is the same for all members, otherwise None."""
    values = {member.about[key] for member in members}
    return values.pop() if len(values) == 1 else None


def _print_result(title: str, about: Mapping[str, Any], result: EvalResult) -> None:
    from train.evaluation.predictions import views_text
    from train.runs.run_dir import shown_errors

    metrics = [name for name, _ in shown_errors(len(about["classes"]))]
    errors = [
        f"{metric} {misses / result.images:.2%} ({misses:,}; 95 %: {low:.2%} to {high:.2%})"
        for metric, misses, (low, high) in zip(metrics, result.misses, result.intervals, strict=False)
    ]
    step = f", step {about['step']:,}" if isinstance(about["step"], int) else ""
    print_line(
        f"{title + ': ' if title else ''}{about['split']}, {views_text(about['views'])}: {', '.join(errors)}, "
        f"loss {result.loss:.4f}, {count_noun(result.images, 'image')}{step}"
    )


def _result_json(predictions: Predictions, result: EvalResult) -> dict[str, Any]:
    (top1, top5), (interval1, interval5) = result.misses, result.intervals
    return {
        **vars(result),
        "top1_misses": top1,
        "top5_misses": top5,
        "top1_interval": list(interval1),
        "top5_interval": list(interval5),
        **{key: predictions.about[key] for key in ("run", "views", "split", "precision", "step")},
    }
