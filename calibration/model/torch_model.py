"""A checkpoint as the exporter's torch modules, with weights, to run candidate schedules on.

Graphs are traced from the same modules, so a schedule does the same in the bundle. Weights that are stored in the compute type
are mapped from their files and read when used. A model that does not fit into memory therefore runs too, slowly.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trio_edge.export.checkpoints.checkpoint import EMBEDDING_NAME, canonical_name, read_checkpoint
from trio_edge.export.checkpoints.text_files import read_text_files
from trio_edge.export.families import family_of
from trio_edge.export.graphs.attention import RotaryTables
from trio_edge.runtime.bundle.errors import BackendError, CheckpointError
from trio_edge.runtime.prompts.tokenizer import Tokenizer
from trio_edge.trio.saliency import ProxySaliency

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.checkpoints.weights import SourceTensor
    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.bundle.manifest import TextSpec
    from trio_edge.runtime.bundle.schedule import Positions, ProbeRows, Schedule
    from trio_edge.runtime.images.interface import ImageProcessing

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TINY_BYTES = 1 << 30
"""Float32 weights up to this size are used whatever memory is free."""
_MEMORY_SHARE = 0.5
"""Share of the free memory that float32 weights may take; larger ones stay in the checkpoint's type."""


@dataclass(frozen=True, kw_only=True)
class TorchModel:
    """A family's modules with weights, and what makes their inputs from questions."""

    parts: FamilyModel
    head: nn.Module
    """Final norm and lm_head, as in the head graph."""
    rotary: RotaryTables
    embedding_VD: Tensor
    images: ImageProcessing
    tokenizer: Tokenizer
    template: str
    text: TextSpec
    positions: tuple[Positions, ...]
    """Rules that the family supports, its default first."""
    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    most_visual: int = 576
    """Largest N that enters a probe; probes take the form that is cheapest for it."""
    _probes: dict[tuple[int, ProbeRows, int], ProxySaliency] = field(default_factory=dict)

    def probe(self, layer: int, schedule: Schedule) -> ProxySaliency:
        """Return the probe before ``layer``, as in a bundle; each is made once."""
        key = layer, schedule.probe_rows, schedule.num_probe_rows
        if key not in self._probes:
            self._probes[key] = ProxySaliency(
                self.parts.layers[layer],
                self.parts.final_norm,
                self.parts.lm_head,
                max_visual=self.most_visual,
                num_probe_rows=schedule.num_probe_rows,
                last_probe_offset=schedule.last_probe_offset,
            )
        return self._probes[key]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, L."""
        return len(self.parts.layers)

    def tensor_names(self) -> dict[nn.Parameter, str]:
        """Return the canonical checkpoint name of every parameter; a tied head has the embedding's."""
        return {value: canonical_name(name) for name, value in self.parts.root.named_parameters()}


def load_model(
    model: str, *, revision: str | None = None, max_visual: int | None = None, device: str = "cpu"
) -> TorchModel:
    """Return the checkpoint ``model`` (alias, Hub id or folder), ready to run on torch's ``device``.

    Images are scaled down to ``max_visual`` visual tokens, in families that can.

    Raises:
        CheckpointError: If the checkpoint cannot be read or exported.
        BackendError: If torch cannot use the device.
    """
    place = _device(device)
    checkpoint = read_checkpoint(model, revision=revision, check_config=family_of)
    family = family_of(checkpoint.folder, checkpoint.config)
    with checkpoint.guarded():
        images = family.image_processing(checkpoint, encoder_keep=None, max_visual=max_visual)
        template = family.default_chat_template(checkpoint)
        text = read_text_files(checkpoint, default_template=template, image_marks=family.image_marks)
        # real initial values would need the whole model's memory, and time
        with FakeTensorMode(allow_non_fake_inputs=True):
            parts = family.build(checkpoint, processing=images, dtype="float32", with_features=False)
    checkpoint.check_parameters(parts.root)
    dtype = _compute_type(checkpoint)
    values = _Values(checkpoint, dtype=dtype, device=place)
    _fill(parts, values, checkpoint)
    return TorchModel(
        parts=parts,
        head=nn.Sequential(parts.final_norm, parts.lm_head),
        rotary=RotaryTables(
            torch.from_numpy(parts.inv_freq).to(place), attention_scaling=parts.attention_scaling
        ),
        embedding_VD=values.of(EMBEDDING_NAME),
        images=images,
        tokenizer=Tokenizer(tokenizers.Tokenizer.from_str(text.tokenizer)),
        template=text.chat_template,
        text=text.spec,
        positions=family.positions,
        checkpoint=checkpoint,
        dtype=dtype,
        device=place,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        reason = " ".join(str(error).split())[:120]
        raise BackendError(
            f"--device: expected a device that torch can use, got {name!r} ({reason}); use cpu"
        ) from None
    return device


def _compute_type(checkpoint: Checkpoint) -> torch.dtype:
    """Return float32 if the weights fit into memory in float32, else the checkpoint's type."""
    num_bytes = sum(4 * math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    free = 0
    if sys.platform == "linux":  # elsewhere a large model stays in the checkpoint's type
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes <= max(_MEMORY_SHARE * free, _TINY_BYTES):
        return torch.float32
    return _TYPES.get(checkpoint.tensor(EMBEDDING_NAME).dtype, torch.float32)


class _Values:
    """Tensors of a checkpoint by canonical name; modules share a tensor that they all use."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype, self._device = dtype, device
        self._tensors: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor:
        if name not in self._tensors:
            raw = self._mapped(self._checkpoint.tensor(name))
            self._tensors[name] = raw.to(device=self._device, dtype=self._dtype)
        return self._tensors[name]

    def _mapped(self, source: SourceTensor) -> Tensor:
        if source.dtype not in _TYPES:
            raise CheckpointError(
                f"{source.file}: expected floating-point weights, got {source.dtype}; use the checkpoint before"
                " quantization"
            )
        # a private copy: torch wants writable memory
        raw = np.memmap(source.file, np.uint8, "c", offset=source.offset, shape=source.num_bytes)
        return torch.from_numpy(raw).view(_TYPES[source.dtype]).reshape(source.shape)


def _fill(parts: FamilyModel, values: _Values, checkpoint: Checkpoint) -> None:
    """Replace the modules' fake parameters and buffers by real ones."""
    real = {}
    for name, parameter in parts.root.named_parameters():
        known = canonical_name(name)
        if known.startswith("vision_tower.") and known not in checkpoint.tensors:
            continue  # of layers after the last one that is used
        real[id(parameter)] = nn.Parameter(values.of(known), requires_grad=False)
    for module in (*parts.root.modules(), *parts.vision.module.modules()):
        for leaf, fake in module._parameters.items():
            if fake is not None and id(fake) in real:
                module._parameters[leaf] = real[id(fake)]
    for name, constant in parts.vision.constants.items():
        path, _, leaf = name.rpartition(".")
        owner: Any = parts.vision.module.get_submodule(path)
        owner._buffers[leaf] = torch.from_numpy(constant).to(values.of(EMBEDDING_NAME).device)
