"""Runs the question's rows of the first layer range separately, after the rows of the images and the text before them.

Up to its last visual token, a prompt does not depend on the question. A bundle exported with --follow-ups runs these rows
first and the question's rows after them, with a separate profile. A further question about the same images reuses the
first rows and runs only its own. Both parts always run separately, so answers are the same bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, final

from trio_edge.runtime.buffers.blocks import Block, Stack, allocate_tensor, copy_tensor
from trio_edge.runtime.buffers.kv_cache import NewRows
from trio_edge.runtime.bundle.graph_io import (
    DEEPSTACK,
    EMBEDS,
    HIDDEN_OUT,
    PAST_LENGTH,
    POSITIONS,
    PREVIOUS,
)
from trio_edge.runtime.devices.interface import DeviceTensor, find_profile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trio_edge.runtime.buffers.decoder import DecoderBuffers
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.devices.interface import Device, Engine, Launch


class _Slot(NamedTuple):
    """The first rows of one prompt: their keys and values, and the range's outputs for them."""

    cache: Stack
    outputs: tuple[DeviceTensor, ...]


@final
class QuestionRows:
    """Runs the question's rows, and keeps the first rows of recent prompts."""

    def __init__(
        self, manifest: Manifest, buffers: DecoderBuffers, engine: Engine, device: Device, *, count: int
    ) -> None:
        """Allocate memory to keep ``count`` prompts; ``engine`` is the first range's and has profiles for follow-ups."""
        self._buffers, self._engine, self._device = buffers, engine, device
        self._spec, self._cache = buffers.ranges[0], buffers.caches[0]
        most, width = manifest.text_buckets[-1], manifest.dimensions.hidden_size
        self._embeds, self._hidden, self._zeros = (self._rows(1, most, width) for _ in range(3))
        whole, own = (
            [buffers.hidden_out[0]],
            [self._hidden],
        )  # for all rows of a prompt; for the question's rows
        if buffers.previous:
            whole.append(buffers.previous[0])
            own.append(self._rows(1, most, width))
        self._outputs = tuple(zip(whole, own))
        size = NewRows(0, self._spec, rows=most).stack.num_bytes
        self._new_rows = device.allocate(size, purpose="new KV rows of a question")
        fields = {POSITIONS: ("int32", (manifest.position_axes, most)), PAST_LENGTH: ("int32", (1,))}
        self._inputs = Block(device, fields, purpose="inputs of a question")
        self._launches: dict[int, Launch] = {}
        self._free = [self._slot(manifest) for _ in range(count)]
        self._kept: OrderedDict[bytes, _Slot] = OrderedDict()

    def _rows(self, *shape: int) -> DeviceTensor:
        hidden = self._spec.tensor(HIDDEN_OUT)
        return allocate_tensor(self._device, hidden, shape, graph="a question")

    def _slot(self, manifest: Manifest) -> _Slot:
        rows = manifest.max_visual + manifest.text_buckets[-1]
        cache = self._cache.stack_like(self._device, rows=rows)
        width = manifest.dimensions.hidden_size
        return _Slot(cache, tuple(self._rows(1, rows, width) for _ in self._outputs))

    def bring_back(self, key: bytes, *, num_rows: int) -> bool:
        """Enqueue copies of a kept prompt's first rows to the range's outputs; return False if they are not kept."""
        if key not in self._kept:
            return False
        self._kept.move_to_end(key)
        slot = self._kept[key]
        self._cache.restore(self._device, slot.cache, num_rows=num_rows)
        for (whole, _), kept in zip(self._outputs, slot.outputs):
            copy_tensor(self._device, whole.rows(0, num_rows), kept.rows(0, num_rows))
        return True

    def keep(self, key: bytes, *, num_rows: int) -> None:
        """Enqueue copies of the first rows from the range's outputs; a prompt without a key is not kept."""
        if not key or not (self._free or self._kept):
            return
        slot = self._free.pop() if self._free else self._kept.popitem(last=False)[1]
        self._cache.save(self._device, slot.cache, num_rows=num_rows)
        for (whole, _), kept in zip(self._outputs, slot.outputs):
            copy_tensor(self._device, kept.rows(0, num_rows), whole.rows(0, num_rows))
        self._kept[key] = slot

    def prepare(self, positions: NDArray[np.int32], *, first: int, bucket: int) -> Launch:
        """Enqueue the inputs of the question's rows and return their launch.

        Args:
            positions: [A, rows], their position ids.
            first: Index of their first row in the prompt.
            bucket: Number of rows after padding.
        """
        axes, count = positions.shape
        ids = self._inputs.host(POSITIONS, (axes, bucket))
        ids[...] = 0
        ids[:, :count] = positions
        self._inputs.host(PAST_LENGTH)[0] = first
        self._inputs.upload(self._device)
        copy_tensor(self._device, self._embeds.rows(0, count), self._buffers.embeds.rows(first, count))
        self._device.clear(self._embeds.rows(count, bucket - count))
        if bucket not in self._launches:
            self._launches[bucket] = self._bound(bucket)
        return self._launches[bucket]

    def finish(self, *, rows: range, bucket: int, num_rows: int) -> None:
        """Enqueue copies of the question's rows, ``rows`` of the prompt, to their place after the first rows.

        ``bucket`` is the number of the question's rows, and ``num_rows`` that of the prompt's rows, with padding.
        """
        new = NewRows(self._new_rows, self._spec, rows=bucket)
        self._cache.append(self._device, new, num_rows=len(rows))
        for whole, own in self._outputs:
            copy_tensor(self._device, whole.rows(rows.start, len(rows)), own.rows(0, len(rows)))
            self._device.clear(whole.rows(rows.stop, num_rows - rows.stop))

    def _bound(self, bucket: int) -> Launch:
        profile = find_profile(self._spec, {"S": bucket, "C": self._cache.capacity})
        tensors = {
            EMBEDS: self._embeds,
            POSITIONS: self._inputs.tensor(POSITIONS),
            PAST_LENGTH: self._inputs.tensor(PAST_LENGTH),
            **self._cache.all_rows(),
            **NewRows(self._new_rows, self._spec, rows=bucket).outputs(),
            **{f"{DEEPSTACK}{layer}": self._zeros for layer in self._buffers.planes[0]},
            HIDDEN_OUT: self._hidden,
        }
        if self._buffers.previous:
            tensors[PREVIOUS] = self._outputs[1][1]
        return self._engine.prepare(profile, self._buffers.at_profile(self._spec, tensors, profile))
