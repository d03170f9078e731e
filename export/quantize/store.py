"""Writes quantized tensors into a bundle, with one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trio_edge.export.checkpoints import weights
from trio_edge.export.quantize.numerics import quantize_weight, stored_bytes
from trio_edge.export.quantize.unpacking import read_weight, taken_over
from trio_edge.runtime.bundle.manifest import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.quantize.plan import Format
    from trio_edge.export.quantize.scales import Smoothing
    from trio_edge.runtime.bundle.manifest import FloatType, StoredType

_FILE = f"{weights.WEIGHTS_FOLDER}/quantized.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredForm:
    """One tensor, and the form in which it is stored."""

    name: str
    kind: Format
    block: int | None = None
    columns_K: Tensor | None = None
    """Inputs that stay in floating point."""
    smoothing: Smoothing | None = None
    is_table: bool = False
    """Whether it is a table of rows, which is not transposed."""
    is_packed: bool = False
    """Whether the checkpoint stores it as integers."""
    is_taken_over: bool = False
    """Whether the bundle stores the checkpoint's integers."""

    @property
    def stored_name(self) -> weights.StoredName:
        """Name in the bundle."""
        changes = []
        if self.is_table:
            changes.append(weights.Change.ROWS)
        elif self.smoothing is not None:
            changes.append(weights.Change.SMOOTHED)
        if self.kind != "none":
            changes.append(weights.Change(self.kind))
        elif self.is_packed:
            changes.append(weights.Change.UNPACKED)
        return weights.StoredName(self.name, tuple(changes))

    @property
    def array_names(self) -> tuple[weights.StoredName, ...]:
        """Names of values and scales, and of the outliers' places and values if there are any."""
        name, more = self.stored_name, (weights.Change.COLUMNS, weights.Change.OUTLIERS)
        return name, name.scales, *(name.part(change) for change in more if self.columns_K is not None)


def store_quantized(
    checkpoint: Checkpoint,
    forms: Sequence[StoredForm],
    bundle: Path,
    *,
    dtype: FloatType,
    on_bytes: Callable[[int], None],
) -> weights.StoredWeights:
    """Write ``forms`` into one file of ``bundle`` and return the place of each.

    Weights [O, I] become [I, O], tables are not transposed. ``dtype`` is that of scales and floating-point tensors.
    ``on_bytes`` is called with the number of bytes just written.

    Raises:
        CheckpointError: If a tensor is missing or has values that are not finite.
    """
    described = {
        name: entry for form in forms for name, entry in _described(checkpoint, form, dtype=dtype).items()
    }
    (bundle / weights.WEIGHTS_FOLDER).mkdir(exist_ok=True)
    values = (array for form in forms for array in _arrays(checkpoint, form, dtype=dtype))
    return weights.write_arrays(bundle / _FILE, described, values, on_bytes=on_bytes)


_STORED: dict[Format, StoredType] = {"int4": "int4", "int8": "int8", "fp8": "float8_e4m3fn"}


def quantized_bytes(checkpoint: Checkpoint, forms: Sequence[StoredForm], *, dtype: FloatType) -> int:
    """Return the number of bytes that ``store_quantized`` writes for ``forms``."""
    return sum(
        StoredTensor(file=_FILE, dtype=kind, shape=shape, offset=0).num_bytes
        for form in forms
        for kind, shape in _described(checkpoint, form, dtype=dtype).values()
    )


def _described(
    checkpoint: Checkpoint, form: StoredForm, *, dtype: FloatType
) -> dict[weights.StoredName, tuple[StoredType, tuple[int, ...]]]:
    """Return dtype and shape of each array of a tensor by its name in the bundle, in the order of ``_arrays``."""
    shape, name = checkpoint.tensor(form.name).shape, form.stored_name
    if form.kind == "none":
        return {name: (dtype, shape)}
    num_outputs, num_inputs = shape
    scales = (num_outputs,) if form.block is None else (num_inputs // form.block, num_outputs)
    values = shape if form.is_table else (num_inputs, num_outputs)
    arrays: list[tuple[StoredType, tuple[int, ...]]] = [(_STORED[form.kind], values), (dtype, scales)]
    if form.columns_K is not None:
        count = len(form.columns_K)
        arrays += [("int64", (count,)), (dtype, (count, num_outputs))]
    return dict(zip(form.array_names, arrays))


def _arrays(checkpoint: Checkpoint, form: StoredForm, *, dtype: FloatType) -> Iterator[Tensor]:
    """Yield the arrays of a tensor."""
    if form.is_taken_over:
        yield from stored_bytes(taken_over(checkpoint, form.name, dtype=dtype), kind=form.kind)
        return
    weight = read_weight(checkpoint, form.name)
    weights.check_finite(weight, checkpoint.tensor(form.name), name=form.name)
    if form.smoothing is not None:
        weight = form.smoothing.apply(weight)
    if form.kind == "none":
        yield weight.to(getattr(torch, dtype))
        return
    quantized = quantize_weight(
        weight, kind=form.kind, dtype=dtype, block=form.block, columns_K=form.columns_K
    )
    if form.is_table:
        # not transposed, as the host reads single rows of a table
        yield from (quantized.values_OI, quantized.scales_OB[:, 0])
    else:
        yield from stored_bytes(quantized, kind=form.kind)
