"""Builds in parts for tests."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from prep.build.parts import Part, PartResult, build_part
from prep.build.plan import BuildPolicy
from prep.cli import main
from prep.console import Progress
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from tests.helpers.building import PPM, STRICT, InlineRunner

IMAGES = 450  # eight shards
WORDS = ("--side", "32", "--format", "ppm")


def alexprep(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def run_part(photos: Path, store: Path, number: int, count: int, policy: BuildPolicy = STRICT) -> PartResult:
    source = list_source(photos, "train", None, None, ())
    part, progress = Part(number, count), Progress(0, "pictures")
    return build_part(source, store, PPM, InlineRunner(), progress, policy, part, f"alexprep build-lmdb {photos}")


def tree(store: Path) -> list[str]:
    return sorted(str(path.relative_to(store)) for path in store.rglob("*"))


def assert_same(store: Path, whole: Store) -> None:
    """The store equals the store `whole` in its manifest, and has the same files."""
    opened = Store.open(store)
    assert opened.fingerprint == whole.fingerprint
    assert opened.splits == whole.splits
    assert tree(store) == tree(whole.root)
    for path in opened.shard_paths("train"):
        assert (Path(path) / "data.mdb").read_bytes() == (
            whole.root / Path(path).relative_to(store) / "data.mdb"
        ).read_bytes()
