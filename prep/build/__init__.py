"""Builds one split of a store: estimates and plans the build, builds or resumes the shards, and assembles the split."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prep.build.from_python import build_from

__all__ = ["build_from"]


def __getattr__(name: str) -> Any:
    """Import build_from only when it is first used, because `alexprep --help` must not load LMDB and Pillow."""
    if name == "build_from":
        from prep.build.from_python import build_from

        return build_from
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
