"""`alextrain evaluate`: of one run, or of several together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.console import count_noun, json_option, print_json, say, store_option
from prep.store.manifest import Store
from train.cli.options import checkpoint_option, gpus_option, precision_option, views_option

if TYPE_CHECKING:
    from train.evaluation.evaluate import EvalResult
    from train.evaluation.predictions import Predictions


@click.command()
@click.argument("runs", metavar="RUN_DIR|FILE.npz...", nargs=-1, required=True, type=click.Path(path_type=Path))
@store_option
@views_option
@checkpoint_option
@click.option("--split", default="val", show_default=True, help="Which split.")
@click.option("--weights", metavar="W,W,…", help="Of several, in their order.  [default: all alike]")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.npz", help="Save probabilities, labels and keys.")
@gpus_option
@precision_option
@json_option
def evaluate(
    runs: tuple[Path, ...],
    store: Path,
    views: str,
    checkpoint: str,
    split: str,
    weights: str | None,
    out: Path | None,
    gpus: str | None,
    precision: str,
    as_json: bool,
) -> None:
    """Error rates of a run's newest checkpoint over a split, each image exactly once.

    Of several runs, or of probabilities that were saved with --out, the errors of each and of the (weighted) average
    of their probabilities, as the paper's five and seven networks.

    \b
    Example:
      alextrain evaluate run --store store --views 10
      alextrain evaluate run --store store --out run.npz
      alextrain evaluate run.npz other.npz third-run --weights 2,1,1
    """
    saved = [path.suffix == ".npz" for path in runs]
    opened = None if all(saved) else Store.open(store)
    if opened is not None:
        opened.split(split)
    from train.evaluation.evaluate import average_probabilities, error_rates
    from train.evaluation.predictions import (
        Predictions,
        check_output_path,
        check_same_images,
        load_predictions,
        parse_weights,
    )

    if out is not None:
        check_output_path(out)  # before the work
    shares, names = parse_weights(weights, len(runs)), [str(path) for path in runs]
    members, results = [], []
    for path, is_saved in zip(runs, saved, strict=True):
        if is_saved or opened is None:
            member = load_predictions(path)
            result = error_rates(average_probabilities([member.probabilities]), member.labels)
        else:
            result, member = _evaluated(path, opened, views, checkpoint, split, gpus, precision)
        members.append(member)
        results.append(result)
        if not as_json:
            _say_result(path.name if len(runs) > 1 else "", member.about, result)
        check_same_images(names[: len(members)], members)
    whole, last = results[0], members[0]
    if len(members) > 1:
        mean = average_probabilities([member.probabilities for member in members], shares)
        whole = error_rates(mean, last.labels)
        about = {**last.about, "run": names, "step": [member.about["step"] for member in members]}
        about |= {name: _shared(members, name) for name in ("views", "precision")}
        last = Predictions(mean.astype("float32"), last.labels, last.keys, about)
        if not as_json:
            _say_result(f"average of {len(members)}" + (f", weights {weights}" if weights else ""), about, whole)
    if out is not None:
        last.save(out)
        say(f"Saved: {out}")
    if as_json:
        each = [_answered(m, r) for m, r in zip(members, results, strict=True)]
        together = {"members": each, "weights": shares} if len(each) > 1 else {}
        print_json({**_answered(last, whole), **together})


def _evaluated(
    path: Path, store: Store, views: str, checkpoint: str, split: str, gpus: str | None, precision: str
) -> tuple[EvalResult, Predictions]:
    from train.config.devices import parse_devices
    from train.evaluation.predictions import DENSE, predict_split, record_evaluation
    from train.model.precision import set_precision
    from train.runs.loading import load_trained, run_and_checkpoint
    from train.runs.preprocessing import check_classes
    from train.runs.run_dir import DESCRIPTION

    devices = parse_devices(gpus)
    set_precision(precision, devices)  # refuses early
    run_dir, checkpoint = run_and_checkpoint(path, checkpoint)
    model, state = load_trained(run_dir, devices, checkpoint)
    check_classes(run_dir, state.classes, store)
    if "train" not in store.splits or state.identity["store_fingerprint"] != store.split("train").fingerprint:
        say(
            f"{store.root} is not the store that {run_dir} was trained on: its mean is subtracted, not the training "
            "store's."
        )
    result, scores = predict_split(
        model, state, store, split, views if views == DENSE else int(views), precision, str(path)
    )
    if (run_dir / DESCRIPTION).exists():  # else it is a checkpoint that lies elsewhere
        record_evaluation(run_dir, scores.about, result)
    return result, scores


def _shared(members: list[Predictions], name: str) -> Any:
    """What all members have in common under a name; None where they differ."""
    values = {member.about[name] for member in members}
    return values.pop() if len(values) == 1 else None


def _say_result(name: str, about: Any, result: EvalResult) -> None:
    from train.evaluation.predictions import views_text

    what, texts = f"{about['split']}, {views_text(about['views'])}", []
    for word, misses, (low, high) in zip(("top-1", "top-5"), result.misses, result.intervals, strict=True):
        texts.append(f"{word} error {misses / result.images:.2%} ({misses:,}; 95 %: {low:.2%} to {high:.2%})")
    step = about["step"] if isinstance(about["step"], int) else None
    click.echo(
        f"{name + ': ' if name else ''}{what}: {', '.join(texts)}, loss {result.loss:.4f}, "
        f"{count_noun(result.images, 'image')}" + (f", step {step:,}" if step is not None else "")
    )


def _answered(member: Predictions, result: EvalResult) -> dict[str, Any]:
    about = {name: member.about[name] for name in ("run", "views", "split", "precision", "step")}
    (top1, top5), (interval1, interval5) = result.misses, result.intervals
    return {
        **vars(result),
        "top1_misses": top1,
        "top5_misses": top5,
        "top1_interval": list(interval1),
        "top5_interval": list(interval5),
        **about,
    }
