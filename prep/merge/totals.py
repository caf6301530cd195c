"""Totals of a split of the new store: sums of counts, origins of the records, versions of the software."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prep.store.manifest import Split, Store


def origin(split: Split) -> dict[str, Any]:
    """Return the item for the source split `split` in the list `sources`, which is in the account of the merged split.

    If `split` is itself the result of a merge, the item contains the list `sources` of `split`.
    """
    origin = {"fingerprint": split.fingerprint, "records": split.records}
    return {**origin, "sources": split.account["sources"]} if "sources" in split.account else origin


def sum_counts(accounts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums of all counts (numbers or objects of numbers) in the accounts.

    For `largest_px`, the result has the largest value instead of the sum.
    """
    total: dict[str, Any] = {}
    for account in accounts:
        for name, value in account.items():
            if name == "largest_px":
                total[name] = max(total.get(name, 0), value)
            elif isinstance(value, int):
                total[name] = total.get(name, 0) + value
            elif isinstance(value, Mapping) and all(isinstance(count, int) for count in value.values()):
                total[name] = dict(Counter(total.get(name, {})) + Counter(value))
    return total


def joined_tools(stores: Sequence[Store]) -> dict[str, str]:
    """Return the versions of the software that made the records, such as `1.2` or, if they differ, `1.2, 1.3`."""
    names = dict.fromkeys(name for store in stores for name in store.tools)
    return {name: ", ".join(dict.fromkeys(store.tools.get(name, "none") for store in stores)) for name in names}
