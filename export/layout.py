"""The fixed sizes of a bundle's graphs, before the graphs exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_edge.runtime.manifest import Profile

if TYPE_CHECKING:
    from trio_edge.runtime.manifest import FloatType
    from trio_edge.runtime.schedule import Schedule

_SMALLEST_BUCKET = 32


def text_buckets(max_text: int) -> tuple[int, ...]:
    """Return the text sizes that prompts are padded to: doublings from 32, and ``max_text`` itself."""
    sizes, size = [], _SMALLEST_BUCKET
    while size < max_text:
        sizes.append(size)
        size *= 2
    return (*sizes, max_text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the shapes of all graphs follow from."""

    max_visual: int
    """N, rows of the visual span."""
    schedule: Schedule
    text_buckets: tuple[int, ...]
    max_new_tokens: int
    dtype: FloatType
    opset: int

    @property
    def visual_rows(self) -> tuple[int, ...]:
        """Rows of the visual span in each layer range: N, then K of every stage."""
        return (self.max_visual, *(stage.keep for stage in self.schedule.stages))

    def layer_ranges(self, num_layers: int) -> tuple[range, ...]:
        """Return the decoder layers of each range."""
        starts = [0, *(stage.layer for stage in self.schedule.stages), num_layers]
        return tuple(range(start, stop) for start, stop in zip(starts, starts[1:]))

    def range_profiles(self, index: int) -> tuple[Profile, ...]:
        """Return the prefill profiles (one per text bucket) and the decode profile of layer range ``index``."""
        rows = self.visual_rows[index]
        prefill = [
            Profile(name=f"prefill_{bucket}", sizes={"S": rows + bucket, "C": 0})
            for bucket in self.text_buckets
        ]
        capacity = rows + self.text_buckets[-1] + self.max_new_tokens
        return (*prefill, Profile(name="decode", sizes={"S": 1, "C": capacity}))

    def select_profiles(self, stage: int) -> tuple[Profile, ...]:
        """Return the profiles of the select graph of ``stage``, one per text bucket."""
        entering, leaving = self.visual_rows[stage], self.visual_rows[stage + 1]
        return tuple(
            Profile(name=f"prefill_{bucket}", sizes={"S": entering + bucket, "R": leaving + bucket})
            for bucket in self.text_buckets
        )

    def head_profiles(self) -> tuple[Profile, ...]:
        """Return the profiles of the head, which reads the last range's output."""
        rows = self.visual_rows[-1]
        prefill = [
            Profile(name=f"prefill_{bucket}", sizes={"S": rows + bucket}) for bucket in self.text_buckets
        ]
        return (*prefill, Profile(name="decode", sizes={"S": 1}))
