"""Writes quantized tensors into a bundle, with one tensor in memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trio_edge.export.checkpoints.weights import (
    WEIGHTS_FOLDER,
    StoredName,
    StoredWeights,
    check_finite,
    write_arrays,
)
from trio_edge.export.quantize.numerics import quantize, stored_bytes
from trio_edge.export.quantize.unpacking import read_weight, taken_over
from trio_edge.runtime.bundle.manifest import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.checkpoints.weights import SourceTensor
    from trio_edge.export.quantize.assign import StoredForm
    from trio_edge.export.quantize.numerics import Format
    from trio_edge.runtime.bundle.manifest import FloatType, StoredType

_FILE = f"{WEIGHTS_FOLDER}/quantized.safetensors"


def store_quantized(
    checkpoint: Checkpoint,
    forms: Sequence[StoredForm],
    bundle: Path,
    *,
    dtype: FloatType,
    on_bytes: Callable[[int], None],
) -> StoredWeights:
    """Write ``forms`` into one file of ``bundle`` and return the place of each.

    Weights [O, I] become [I, O], tables are not transposed. ``dtype`` is that of scales and floating-point tensors.
    ``on_bytes`` is called with the number of bytes just written.

    Raises:
        CheckpointError: If a tensor is missing or has values that are not finite.
    """
    writers = [_Writer(checkpoint, form, dtype=dtype) for form in forms]
    described = {name: entry for writer in writers for name, entry in writer.described().items()}
    (bundle / WEIGHTS_FOLDER).mkdir(exist_ok=True)
    values = (tensor for writer in writers for tensor in writer.tensors())
    return write_arrays(bundle / _FILE, described, values, on_bytes=on_bytes)


_STORED: dict[Format, StoredType] = {"int4": "int4", "int8": "int8", "fp8": "float8_e4m3fn"}


def quantized_bytes(checkpoint: Checkpoint, forms: Sequence[StoredForm], *, dtype: FloatType) -> int:
    """Return the number of bytes that ``store_quantized`` writes for ``forms``."""
    writers = [_Writer(checkpoint, form, dtype=dtype) for form in forms]
    return sum(
        StoredTensor(file=_FILE, dtype=kind, shape=shape, offset=0).num_bytes
        for writer in writers
        for kind, shape in writer.described().values()
    )


class _Writer:
    """One tensor to write: describes the arrays first, and computes them later."""

    def __init__(self, checkpoint: Checkpoint, form: StoredForm, *, dtype: FloatType) -> None:
        self.checkpoint = checkpoint
        self.source: SourceTensor = checkpoint.tensor(form.name)
        self.form = form
        self.dtype = dtype

    def described(self) -> dict[StoredName, tuple[StoredType, tuple[int, ...]]]:
        """Return dtype and shape of each array by its name in the bundle, in the order of ``tensors``."""
        form, shape = self.form, self.source.shape
        if form.kind == "none":
            return {form.stored_name: (self.dtype, shape)}
        num_outputs, num_inputs = shape
        scales = (num_outputs,) if form.block is None else (num_inputs // form.block, num_outputs)
        values = shape if form.is_table else (num_inputs, num_outputs)
        name = form.stored_name
        return {name: (_STORED[form.kind], values), name.scales: (self.dtype, scales)}

    def tensors(self) -> Iterator[Tensor]:
        """Yield the arrays."""
        form = self.form
        if form.is_taken_over:
            integers = taken_over(self.checkpoint, form.name, dtype=self.dtype)
            yield from stored_bytes(integers, kind=form.kind)
            return
        weight = read_weight(self.checkpoint, form.name)
        check_finite(weight, self.source, name=form.name)
        if form.smoothing is not None:
            weight = form.smoothing.apply(weight)
        if form.kind == "none":
            yield weight.to(getattr(torch, self.dtype))
            return
        quantized = quantize(weight, kind=form.kind, dtype=self.dtype, block=form.block)
        if form.is_table:
            # not transposed, as the host reads single rows of a table
            yield from (quantized.values_OI, quantized.scales_OB[:, 0])
        else:
            yield from stored_bytes(quantized, kind=form.kind)
