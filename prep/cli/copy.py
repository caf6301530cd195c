"""`alexprep copy`: the command that copies a store between local folders and buckets."""

from __future__ import annotations

from dataclasses import asdict

import click

from prep.console import (
    bytes_text,
    count_noun,
    duration_text,
    json_option,
    print_json,
    print_line,
    progress,
    usable_cores,
)
from prep.files import no_lock_option

# Eight parallel transfers already use the whole connection. More transfers would only make each transfer slower.
_MAX_DEFAULT_JOBS = 8


@click.command("copy")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    metavar="N",
    help=f"Number of worker processes that copy files.  [default: number of usable cores, at most {_MAX_DEFAULT_JOBS}]",
)
@no_lock_option
@json_option
def copy(source: str, target: str, jobs: int | None, as_json: bool) -> None:
    """Copy the store SRC to DST, and verify every file after it has arrived.

    SRC and DST are folders or URLs: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///PATH. URLs with s3:// and gs://
    need the package obstore (pip extra `remote`). Environment variables give the credentials. For s3:// set
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL, or AWS_PROFILE. For gs:// set
    GOOGLE_APPLICATION_CREDENTIALS.

    The command compares each shard with its digest in the manifest, and reads back every file that it sends to a
    bucket. The manifest is written last, so a DST with a manifest is complete. If the connection fails, the command
    repeats the request for half a minute. After an error or an interruption, the same command continues with the files
    that have not arrived.

    \b
    Example:
      alexprep copy store s3://my-bucket/stores/ilsvrc
      alexprep copy s3://my-bucket/stores/ilsvrc /local/store --jobs 8
      AWS_ENDPOINT_URL=http://minio:9000 alexprep copy store s3://my-bucket/store --json
    """
    from prep.remote.copy_store import MB, planned_copy, run_copy
    from prep.workers import WorkerPool

    with planned_copy(source, target) as plan:
        size_mb = plan.size_bytes // MB
        with (
            WorkerPool(jobs or min(usable_cores(), _MAX_DEFAULT_JOBS)) as workers,
            progress("copying", size_mb, "MB") as copy_progress,
        ):
            result = run_copy(plan, workers, copy_progress)
    if as_json:
        facts = {"source": plan.source.name, "target": plan.target.name, **asdict(result)}
        facts |= {"seconds": round(result.seconds, 3), "already_complete": plan.is_complete}
        print_json(facts)
        return
    if plan.is_complete:
        print_line(f"{plan.target.name}: already there; nothing to do. Fingerprint {result.fingerprint}")
        return
    earlier = result.files - result.copied_files
    print_line(
        f"{plan.target.name}: {count_noun(result.copied_files, 'file')}, {bytes_text(result.copied_bytes)}, "
        f"{duration_text(result.seconds)}, {bytes_text(result.copied_bytes / max(result.seconds, 1e-9))}/s"
        + (f"; {count_noun(earlier, 'file')} had arrived before" if earlier else "")
        + (f"; {count_noun(result.retries, 'retry', 'retries')}" if result.retries else "")
        + f". Fingerprint {result.fingerprint}"
    )
