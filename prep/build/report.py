"""Prints the results of `alexprep` commands as lines of text, or as one JSON object with --json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.console import bytes_text, count_noun, duration_text, print_json, print_line, shell_quoted
from prep.inputs.classes import examples, first_labels_text
from prep.store.input_log import IGNORED, WARNED, read_outcomes, summarize_outcomes
from prep.store.manifest import DROPPED, ColorStats, Store

if TYPE_CHECKING:
    from prep.build.parts import Part, PartResult
    from prep.build.split import BuildEstimate
    from prep.inputs.reader import Source  # a run-time import would load LMDB and Pillow, even for --help

_ALREADY_BUILT = "  already built from the same inputs with the same settings; nothing to do"


def report_build(store: Store, name: str, done: int, seconds: float, as_json: bool, if_none: str = "") -> None:
    """Print the result of the build of split `name`; this run processed `done` of the split's inputs.

    If this run processed no input, the line `if_none` is printed instead of the rate.
    """
    split = store.split(name)
    skipped = split.account["inputs"] - split.records
    fields = {field_name: field.type for field_name, field in sorted(split.extra.items())}
    if as_json:
        print_json(
            {
                "split": name,
                "records": split.records,
                "classes": len(store.classes),
                "skipped": skipped,
                "warned": sum(split.account.get("warnings", {}).values()),
                "bytes": split.bytes,
                "seconds": round(seconds, 3),
                "images_per_s": round(done / max(seconds, 1e-9), 1),
                "fingerprint": split.fingerprint,
                **({"extra": fields} if fields else {}),
            }
        )
        return
    print_line(
        f"{name}: {count_noun(split.records, 'record')} of {count_noun(len(store.classes), 'class', 'classes')}, "
        f"{bytes_text(split.bytes)} in {count_noun(len(split.shards), 'shard')}, fingerprint {split.fingerprint[:16]}"
    )
    print_line(f"  labels: {first_labels_text(store.classes)}")
    if fields:
        print_line("  extra fields: " + ", ".join(f"{field_name} ({kind})" for field_name, kind in fields.items()))
    log = store.root / name / "inputs.jsonl"
    ignored = split.account.get(IGNORED, {})
    if ignored:
        text = ", ".join(f"{reason} ({count:,})" for reason, count in ignored.items())
        print_line(f"  not part of the data set: {text}. The first:")
        for outcome in islice((outcome for outcome in read_outcomes(log) if outcome["fate"] == IGNORED), 3):
            print_line(f"    {outcome['source']}")
    _print_kept(split.account, read_outcomes(log), store.settings.background, f", listed in {log}")
    if skipped:
        print_line(f"  left out: {count_noun(skipped, 'input')}, listed with reasons in {log}. The first:")
        for outcome in islice((outcome for outcome in read_outcomes(log) if outcome["fate"] == "bad"), 3):
            print_line(f"    {outcome['source']}: {outcome['why']}")
    if done:
        print_line(f"  {duration_text(seconds)}, {done / max(seconds, 1e-9):,.0f} images/s")
    else:
        print_line(if_none or _ALREADY_BUILT)


def _print_kept(
    account: Mapping[str, Any], outcomes: Iterable[Mapping[str, Any]], background: str, listed_in: str = ""
) -> None:
    """Print how many inputs were converted, how many were kept with warnings, and the first warnings."""
    alpha = "dropped" if background == DROPPED else f"over {background}"
    kinds = {kind: kind for kind in account["converted"]} | {"alpha": f"alpha ({alpha})"}
    converted = ", ".join(f"{count:,} {kinds[kind]}" for kind, count in sorted(account["converted"].items()))
    if converted:
        print_line(f"  converted: {converted}")
    warned = sum(account.get("warnings", {}).values())
    if warned:
        print_line(f"  kept, with warnings: {count_noun(warned, 'input')}{listed_in}. The first:")
        for outcome in islice((outcome for outcome in outcomes if outcome["fate"] == WARNED), 3):
            print_line(f"    {outcome['source']}: {'; '.join(outcome['warnings'])}")


def report_part(
    result: PartResult, part: Part, store: Path, name: str, done: int, seconds: float, as_json: bool
) -> None:
    """Print the result of one part of the build of split `name`; this run processed `done` of the part's inputs."""
    if result.store is not None:
        report_build(
            result.store, name, done, seconds, as_json, "  all parts are finished; nothing to do for this part"
        )
        return
    missing = [str(other) for other in result.missing]
    if as_json:
        rate = round(done / max(seconds, 1e-9), 1)
        line = {"split": name, "part": str(part), "shards": result.shards, "missing_parts": missing}
        print_json({**line, "seconds": round(seconds, 3), "images_per_s": rate})
        return
    print_line(
        f"{name}: part {part} is finished ({count_noun(result.shards, 'shard')}), {duration_text(seconds)}, "
        f"{done / max(seconds, 1e-9):,.0f} images/s"
    )
    if missing:
        print_line(f"  parts to be finished: {', '.join(missing[:8])}{', …' if len(missing) > 8 else ''}")
    else:
        print_line("  all shards are finished, and another command is using the store")
    print_line(
        f"  the part that ends last completes the store; alexprep join --store {shell_quoted(store)} does so, too"
    )


def report_estimate(estimate: BuildEstimate, source: Source, background: str, as_json: bool) -> None:
    """Print the estimate for a build of the split `source`; `background` is the colour behind transparent pixels."""
    resources, name = estimate.resources, source.split
    account = summarize_outcomes(estimate.outcomes)
    to_do = len(source.inputs) - estimate.done
    if as_json:
        print_json(
            {
                "split": name,
                "inputs": estimate.inputs,
                "classes": estimate.classes,
                "bad": [{"source": bad, "why": reason} for bad, reason in estimate.bad],
                "decoded": estimate.decoded,
                "converted": account["converted"],
                "warned": [
                    {"source": outcome["source"], "warnings": outcome["warnings"]}
                    for outcome in estimate.outcomes
                    if outcome["fate"] == WARNED
                ],
                "done": estimate.done,
                "bytes": resources and resources.bytes,
                "seconds": resources and round(resources.seconds, 1),
                "free_bytes": estimate.free_bytes,
                **({"extra": {field: column.type for field, column in source.extra.items()}} if source.extra else {}),
            }
        )
        return
    print_line(f"{name}: {count_noun(estimate.inputs, 'input')} of {count_noun(estimate.classes, 'class', 'classes')}")
    print_line(f"  labels: {first_labels_text(source.classes)}")
    if source.ignored:
        names = examples([ignored for ignored, _ in source.ignored])
        count = count_noun(len(source.ignored), "entry", "entries")
        print_line(f"  not part of the data set: {count} ({names})")
    if estimate.bad:
        what = "is not an image" if len(estimate.bad) == 1 else "are not images"
        print_line(f"  {count_noun(len(estimate.bad), 'input')} {what}. The first:")
        for bad, reason in estimate.bad[:10]:
            print_line(f"    {bad}: {reason}")
    if estimate.new_fields:
        print_line(f"  already built; the build adds the extra fields {', '.join(estimate.new_fields)}")
        return
    if estimate.is_built:
        print_line(_ALREADY_BUILT)
        return
    _print_kept(account, estimate.outcomes, background)
    if estimate.decoded < to_do:
        print_line(
            f"  decoded: a sample of {estimate.decoded:,} of {count_noun(to_do, 'input')}. Pass --decode all to "
            "find all bad inputs that a build would find."
        )
    if estimate.done:
        print_line(f"  {count_noun(estimate.done, 'input')} in finished shards, {to_do:,} to do")
    free = f"{bytes_text(estimate.free_bytes)} free"
    if resources is None:
        print_line(f"  no estimate: none of the {estimate.decoded:,} decoded inputs is an image; {free}")
        return
    verdict = "fits" if resources.bytes <= estimate.free_bytes else "does NOT fit"
    print_line(
        f"  about {bytes_text(resources.bytes)} and {duration_text(resources.seconds)} (measured on "
        f"{resources.sampled:,} inputs; a slow source takes longer); {free}: {verdict}"
    )


def print_stats(stats: ColorStats) -> None:
    """Print mean, covariance and principal components of RGB, each with its unit."""

    def row(values: Iterable[float], width: int = 10, digits: int = 4) -> str:
        return "".join(f"{value:{width}.{digits}f}" for value in values)

    print_line(
        f"{stats.records:,} records, {stats.pixels:,} pixels, RGB on the scale 0..{stats.pixel_scale} (grey levels)"
    )
    print_line(f"mean RGB                {row(stats.mean_rgb, digits=2)}   grey levels")
    levels, unit = stats.channel_stats(), stats.channel_stats(max_value=1)
    print_line(f"std RGB                 {row(levels.std, digits=2)}   grey levels")
    print_line(f"mean RGB, [0, 1]        {row(unit.mean)}   as torchvision.transforms.Normalize takes it")
    print_line(f"std RGB, [0, 1]         {row(unit.std)}   as torchvision.transforms.Normalize takes it")
    for name, values in zip("RGB", stats.covariance, strict=True):
        print_line(f"covariance {name}            {row(values, digits=1)}   grey levels squared")
    print_line(f"                        {'PC 1':>10}{'PC 2':>10}{'PC 3':>10}")
    print_line(f"standard deviation      {row(stats.stdevs, digits=2)}   grey levels (color_pca of the authors' code)")
    print_line(f"eigenvalue              {row(stats.eigenvalues, digits=1)}   variance, grey levels squared")
    unit_scale = [value / stats.pixel_scale**2 for value in stats.eigenvalues]
    print_line(
        f"eigenvalue, [0, 1]      {row(unit_scale)}   variance of pixels in [0, 1] "
        "(fb.resnet.torch: 0.2175 0.0188 0.0045)"
    )
    for name, values in zip("RGB", stats.eigenvectors, strict=True):
        print_line(f"eigenvectors {name}          {row(values)}")
