"""The sections of a model that are calibrated one by one: the vision graph, each decoder layer, the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_edge.export.graphs.linear_groups import LinearGroup, decoder_groups
from trio_edge.export.quantize.assign import int4_block

if TYPE_CHECKING:
    from torch import nn

    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.quantize.report import SectionPart
    from trio_edge.export.quantize.plan import Format, QuantizePlan
    from trio_edge.runtime.bundle.manifest import QuantizedFormat
    from trio_edge.runtime.bundle.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A module and its groups of linear layers."""

    part: SectionPart
    module: nn.Module
    groups: tuple[LinearGroup, ...]
    """Those whose weights ``kind`` can store."""
    kind: QuantizedFormat


def quantized_sections(model: TorchModel, schedule: Schedule, plan: QuantizePlan) -> list[Section]:
    """Return the sections that ``plan`` quantizes, in the order in which they run."""
    parts = model.parts
    decoder_formats = plan.of_layers(schedule, num_layers=model.num_layers)
    head = LinearGroup(name="lm_head", layer=None, linears=(parts.lm_head,), before=parts.final_norm)
    every: list[tuple[SectionPart, nn.Module, tuple[LinearGroup, ...], Format]] = [
        ("vision", parts.vision.module, parts.vision.linear_groups, plan.of_part("vision")),
        *(
            ("decoder", layer, decoder_groups(layer, index=index), kind)
            for index, (layer, kind) in enumerate(zip(parts.layers, decoder_formats))
        ),
        ("head", model.head, (head,), plan.of_part("head")),
    ]
    return [
        Section(
            part=part,
            module=module,
            groups=tuple(group for group in groups if kind != "int4" or block_of(group) is not None),
            kind=kind,
        )
        for part, module, groups, kind in every
        if kind != "none"
    ]


def block_of(group: LinearGroup) -> int | None:
    """Return the block size of a group's INT4 weights, in inputs; None if one of them cannot be INT4."""
    blocks = [int4_block(linear.get_parameter("weight").shape) for linear in group.linears]
    return None if None in blocks else blocks[0]
