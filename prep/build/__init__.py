"""Building one split of a store: estimate, plan, build the shards, resume after an interruption, assemble."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prep.build.from_python import build_from

__all__ = ["build_from"]


def __getattr__(name: str) -> Any:
    """Import build_from when it is first used: the command's --help must not load LMDB and Pillow."""
    if name == "build_from":
        from prep.build.from_python import build_from

        return build_from
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
