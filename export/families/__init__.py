"""Model families, with their base class in ``base``. To add one, write it and list it here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.export.checkpoints.packed import PACKING, packed_format
from trio_edge.export.families.internvl import InternVl
from trio_edge.export.families.lfm2 import Lfm2Vl
from trio_edge.export.families.llava import Llava, LlavaNext, LlavaOnevision
from trio_edge.export.families.minicpm import MiniCpmV46
from trio_edge.export.families.mistral import Mistral3
from trio_edge.export.families.qwen import Cosmos3, Qwen3Vl, Qwen25Vl, Qwen35
from trio_edge.export.families.smolvlm import SmolVlm
from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.export.families.base import Family

__all__ = ["FAMILIES", "family_of"]

_ALL = (
    *(Llava(), LlavaNext(), LlavaOnevision(), Qwen25Vl(), Qwen3Vl(), Cosmos3(), Qwen35()),
    *(InternVl(), SmolVlm(), Mistral3(), Lfm2Vl(), MiniCpmV46()),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def family_of(folder: Path, config: dict[str, Any]) -> Family:
    """Return the family of the checkpoint in ``folder`` with ``config``, the content of config.json.

    Weights are not read, as they may not be downloaded yet.

    Raises:
        CheckpointError: If the checkpoint has remote code, an unknown family or a packing that is not supported.
    """
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder}: expected an architecture of transformers, got one with remote code, which is never run; use a"
            " checkpoint in the transformers format (names ending in -hf)"
        )
    if PACKING in config:
        packed_format(folder, config[PACKING])
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"{folder}: expected model_type {', '.join(FAMILIES)}, got {config.get('model_type')!r}; this architecture cannot"
            " be exported"
        )
    return family
