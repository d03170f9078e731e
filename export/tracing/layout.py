"""The fixed sizes of a bundle's graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trio_edge.runtime.bundle.graph_io import CANDIDATES
from trio_edge.runtime.bundle.manifest import Profile

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

    def reduce_profiles(self, *, with_text: bool) -> tuple[Profile, ...]:
        """Return the profiles of the selector before the decoder; T text rows or M texts of CLIP, if it reads them."""
        if self.clip_texts:
            return self._reduce_profiles("M", self.clip_texts)
        if with_text:
            return self._reduce_profiles("T", self.text_buckets)
        return tuple(Profile(name=f"n{rows}", sizes={"N": rows}) for rows in self.vision_rows)

    def _reduce_profiles(self, symbol: str, counts: tuple[int, ...]) -> tuple[Profile, ...]:
        return tuple(
            Profile(name=f"n{rows}+{count}", sizes={"N": rows, symbol: count})
            for rows in self.vision_rows
            for count in counts
        )

    def clip_text_profiles(self) -> tuple[Profile, ...]:
        """Return the profiles of CLIP's text tower."""
        return tuple(Profile(name=f"m{count}", sizes={"M": count}) for count in self.clip_texts)

    def visual_rows(self, index: int) -> tuple[int, ...]:
        """Return the possible numbers of visual rows of layer range ``index``: every N, or K of its stage."""
        return self.visual_sizes if index == 0 else (self.schedule.stages[index - 1].keep,)

    def layer_ranges(self, num_layers: int) -> tuple[range, ...]:
        """Return the decoder layers of each range."""
        starts = [0, *(stage.layer for stage in self.schedule.stages), num_layers]
        return tuple(range(start, stop) for start, stop in zip(starts, starts[1:]))

    def vision_profiles(self) -> tuple[Profile, ...]:
        """Return the vision graph's profiles in the order in which a runtime tries them."""
        return tuple(
            Profile(name="_".join(f"{name.lower()}{size}" for name, size in sizes.items()), sizes=dict(sizes))
            for sizes in self.vision_sizes
        )

    def range_profiles(self, index: int) -> tuple[Profile, ...]:
        """Return the profiles of prefills (per visual size and text bucket), of follow-ups, and of decode."""
        prefill = [
            Profile(name=name, sizes={"S": rows + bucket, "C": 0})
            for name, rows, bucket in self._prefills(index)
        ]
        capacity = max(self.visual_rows(index)) + self.text_buckets[-1] + self.max_new_tokens
        follow_ups = [
            Profile(name=f"follow_{bucket}", sizes={"S": bucket, "C": capacity})
            for bucket in self.text_buckets
            if self.follow_ups and index == 0
        ]
        return (*prefill, *follow_ups, Profile(name="decode", sizes={"S": 1, "C": capacity}))

    def select_profiles(self, stage: int, *, with_prompt: bool) -> tuple[Profile, ...]:
        """Return the profiles of the select graph of ``stage``; F rows of the whole prompt, if it reads them."""
        keep = self.schedule.stages[stage].keep
        if not with_prompt:
            return tuple(
                Profile(name=name, sizes={"N": rows, "S": rows + bucket, "R": keep + bucket})
                for name, rows, bucket in self._prefills(stage)
            )
        return tuple(
            Profile(
                name=name if stage == 0 else f"prefill_{whole}+{bucket}",
                sizes={"N": rows, "S": rows + bucket, "R": keep + bucket, "F": whole + bucket},
            )
            for name, rows, bucket in self._prefills(stage)
            for whole in ((rows,) if stage == 0 else self.visual_sizes)
        )

    def probe_profiles(self, stage: int, half: Literal["probe", "saliency"]) -> tuple[Profile, ...]:
        """Return the profiles of a half of a stage's probe; the symbols of the backward half start with G."""
        letter = "P" if half == "probe" else "G"
        return tuple(
            Profile(
                name=name.replace("prefill", half),
                sizes={
                    f"{letter}S": rows + bucket,
                    f"{letter}N": rows,
                    f"{letter}R": self.schedule.num_probe_rows,
                },
            )
            for name, rows, bucket in self._prefills(stage)
        )

    def head_profiles(self, *, is_shared: bool = False) -> tuple[Profile, ...]:
        """Return the profiles of the head, which reads the last range's output; one that probes share has L rows."""
        own = {"L": 1} if is_shared else {}
        prefill = [
            Profile(name=name, sizes={"S": rows + bucket, **own})
            for name, rows, bucket in self._prefills(len(self.schedule.stages))
        ]
        return (*prefill, Profile(name="decode", sizes={"S": 1, **own}))

    def candidate_profiles(self) -> tuple[Profile, ...]:
        """Return the profile of the head on all probe rows; none if it has one, as in decode."""
        rows = self.schedule.num_probe_rows
        return (Profile(name=CANDIDATES, sizes={"S": rows, "L": rows}),) if rows > 1 else ()

    def gradient_profiles(self) -> tuple[Profile, ...]:
        """Return the profile of the head's gradient."""
        return (Profile(name="gradient", sizes={"GR": self.schedule.num_probe_rows}),)

    def _prefills(self, index: int) -> list[tuple[str, int, int]]:
        """Return name, visual rows and text bucket of every prefill of layer range ``index``."""
        sizes = self.visual_rows(index)
        return [
            (f"prefill_{bucket}" if len(sizes) == 1 else f"prefill_{rows}+{bucket}", rows, bucket)
            for rows in sizes
            for bucket in self.text_buckets
        ]
