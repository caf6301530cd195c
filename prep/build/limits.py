"""Limits that decide which inputs a build keeps: number of pixels, warnings of the decoder, decoding time.

These limits may change between two runs of a build. A finished shard is built again only if the new limits keep an
input that was left out, or leave out an input that was kept. For example, a higher --max-pixels affects only shards
that lack an input because of its number of pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prep.images.codec import BadImage, DecodedImage, DecodeOptions
from prep.images.limits import MAX_PIXELS, TIME_LIMIT_S, too_slow_text
from prep.store.manifest import Settings


@dataclass(frozen=True)
class InputLimits:
    """Limits of the inputs that a build keeps."""

    max_pixels: int = MAX_PIXELS  # an input with more pixels than this is bad
    keep_warned: bool = True  # whether an input with warnings of its decoder is kept; if False, such an input is bad
    time_limit_s: float = TIME_LIMIT_S  # an input whose decoding takes more CPU time than this is bad; 0: no limit

    def decode_options(self, settings: Settings) -> DecodeOptions:
        """Return the decoding options of a build with these limits and with `settings`."""
        return DecodeOptions(self.max_pixels, settings.background, settings.reduce_above, 2 * settings.side_px)

    def check_warnings(self, image: DecodedImage) -> None:
        """Raise BadImage if the image has warnings and `keep_warned` is False."""
        if image.warnings and not self.keep_warned:
            reason = f"decoded with warnings: {'; '.join(image.warnings)}"
            raise BadImage(reason, limit="on_warning", warnings=list(image.warnings))

    def too_slow(self) -> BadImage:
        """Return the error for an input whose decoding takes more CPU time than `time_limit_s`."""
        reason = f"{too_slow_text(self.time_limit_s)}; --time-limit sets this limit"
        return BadImage(reason, limit="time_limit", seconds=self.time_limit_s)

    def find_changed(self, outcomes: Iterable[Mapping[str, Any]], largest_px: int) -> str:
        """Return the name, or the number of pixels, of an input to which these limits would give another fate.

        Such an input was kept by an earlier run but would be left out by these limits, or was left out but would be
        kept. Returns an empty text if there is no such input.

        outcomes    the lines of inputs.jsonl of the earlier run
        largest_px  number of pixels of the largest input that the earlier run kept
        """
        if largest_px > self.max_pixels:
            return f"a picture of {largest_px:,} pixels"
        return next((outcome["source"] for outcome in outcomes if self._changes(outcome)), "")

    def _changes(self, outcome: Mapping[str, Any]) -> bool:
        limit = outcome.get("limit")
        if limit == "max_pixels":
            return bool(outcome["pixels"] <= self.max_pixels)
        if limit == "time_limit":
            return not self.time_limit_s or bool(outcome["seconds"] < self.time_limit_s)
        return "warnings" in outcome and (outcome["fate"] == "bad") == self.keep_warned


DEFAULT_LIMITS = InputLimits()
