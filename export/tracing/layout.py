"""The fixed sizes of a bundle's graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Schedule


def vision_profiles(
    images: Sequence[Mapping[str, int]], *, schedule: Schedule, token_keep: int | None, max_images: int = 1
) -> tuple[Mapping[str, int], ...]:
    """Return the sizes that the vision graph runs at, by ascending N.

    A selection needs at least as many rows as it keeps, so N is at least ``token_keep`` or the first stage's K.

    Args:
        images: The sizes of each exported image, including N.
        schedule: Its stages.
        token_keep: K of the selector before the decoder, or None.
        max_images: Images of a prompt.
    """
    least = schedule.stages[0].keep if schedule.stages and max_images == 1 else 1
    if token_keep is not None:
        least = token_keep
    raised = {tuple(sorted({**sizes, "N": max(sizes["N"], least)}.items())) for sizes in images}
    return tuple(
        sorted(map(dict, raised), key=lambda sizes: (sizes["N"], *(sizes[name] for name in sorted(sizes))))
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The sizes that determine the shapes of all graphs."""

    vision_sizes: tuple[Mapping[str, int], ...]
    """Sizes of the vision graph's profiles, including N."""
    schedule: Schedule
    token_keep: int | None
    """K of the selector before the decoder, or None."""
    text_buckets: tuple[int, ...]
    max_new_tokens: int
    dtype: FloatType
    opset: int
    clip_texts: tuple[int, ...] = ()
    """Every M of CLIP's text tower, ascending; empty without one."""
    follow_ups: bool = False
    """Whether the first range can run a question after the kept rows of an earlier one."""
    max_images: int = 1
    most_of_several: int = 0
    """Most visual tokens of an image in a prompt with several images."""

    @property
    def vision_rows(self) -> tuple[int, ...]:
        """Every N of the vision graph, ascending."""
        return tuple(sorted({sizes["N"] for sizes in self.vision_sizes}))

    @property
    def visual_sizes(self) -> tuple[int, ...]:
        """Every N of the prefix graph, ascending: of one image, and of all, half, a quarter, … of the most images."""
        sizes = {*self.vision_rows} if self.token_keep is None else {self.token_keep}
        of_several = self.most_of_several if self.token_keep is None else self.token_keep
        count = self.max_images
        while count > 1:
            sizes.add(count * of_several)
            count = (count + 1) // 2
        least = self.schedule.stages[0].keep if self.schedule.stages else 1
        return tuple(sorted({max(size, least) for size in sizes}))

    def visual_rows(self, index: int) -> tuple[int, ...]:
        """Return the possible numbers of visual rows of layer range ``index``: every N, or K of its stage."""
        return self.visual_sizes if index == 0 else (self.schedule.stages[index - 1].keep,)

    def layer_ranges(self, num_layers: int) -> tuple[range, ...]:
        """Return the decoder layers of each range."""
        starts = [0, *(stage.layer for stage in self.schedule.stages), num_layers]
        return tuple(range(start, stop) for start, stop in zip(starts, starts[1:]))
