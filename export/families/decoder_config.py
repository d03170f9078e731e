"""Checks a decoder's configuration for what the graphs replace: rotary tables, attention masks and their lengths.

Everything else in a decoder comes with transformers' own layers, which the graphs wrap: biases, head sizes that differ
from ``hidden_size / num_attention_heads``, tied embeddings. Rotary tables are constants of a graph, so RoPE types whose
frequencies follow the sequence length are exported only where they cannot change; the graphs' causal mask has no
window, so a sliding window is exported only where it cannot cut anything off of what a schedule leaves.

| RoPE type                  | exported                                                                |
|----------------------------|-------------------------------------------------------------------------|
| default, linear, llama3    | yes                                                                     |
| yarn                       | yes, with its factor on the tables                                      |
| dynamic                    | up to ``max_position_embeddings``, where it is the default type         |
| longrope                   | up to ``original_max_position_embeddings``, with its short factors      |
| others, partial or by layer | no                                                                     |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.export.checkpoints.checkpoint import HEAD_NAME
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.export.checkpoints.checkpoint import Checkpoint

_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_GROWING_ROPE_TYPES = ("dynamic", "longrope")
_WINDOWED = "sliding_attention"
_LAYER_TYPES = ("full_attention", _WINDOWED)


def check_decoder(text_config: Any, *, folder: Path) -> None:
    """Raise CheckpointError if the graphs cannot express the decoder that ``text_config`` describes at any length.

    Args:
        text_config: transformers' configuration of the decoder.
        folder: The checkpoint's, for the message.
    """
    rope = _rope(text_config)
    rope_type, known = rope.get("rope_type"), (*_FIXED_ROPE_TYPES, *_GROWING_ROPE_TYPES)
    if rope_type not in known:
        raise CheckpointError(
            f"{folder}/config.json rope_type: expected one for all layers, of {', '.join(known)}, got {rope_type!r};"
            " this decoder cannot be exported"
        )
    rotary = rope.get("partial_rotary_factor", 1.0)
    if rotary != 1.0:
        raise CheckpointError(
            f"{folder}/config.json partial_rotary_factor: expected 1, got {rotary}; this decoder cannot be exported"
        )
    unknown = set(getattr(text_config, "layer_types", None) or ()) - set(_LAYER_TYPES)
    if unknown:
        raise CheckpointError(
            f"{folder}/config.json layer_types: expected {' or '.join(_LAYER_TYPES)}, got {', '.join(sorted(unknown))};"
            " this decoder cannot be exported"
        )


def untie_stored_head(config: Any, checkpoint: Checkpoint) -> None:
    """Switch ``config.tie_word_embeddings`` off where the checkpoint stores a head.

    Fine-tuning can produce checkpoints whose head differs from the embedding table that they claim it is tied to;
    transformers then uses the head that is there.

    Args:
        config: transformers' configuration of the whole model; changed.
        checkpoint: Holds the tensors.
    """
    config.tie_word_embeddings = config.tie_word_embeddings and HEAD_NAME not in checkpoint.tensors


def max_positions(text_config: Any) -> int:
    """Return how many positions the decoder is made for.

    That is ``max_position_embeddings``, or the RoPE scaling's factor times its original length where that is more:
    checkpoints differ in whether they raise the former with the latter.
    """
    limit, rope = int(text_config.max_position_embeddings), _rope(text_config)
    if rope["rope_type"] == "longrope":
        return int(rope["original_max_position_embeddings"])
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if rope["rope_type"] in ("yarn", "llama3") and original and factor:
        return max(limit, int(original * factor))
    return limit


def sliding_window(text_config: Any) -> tuple[int, int] | None:
    """Return the first layer whose rows see only so many rows, and how many; None if every row sees all before it."""
    window, layer_types = (
        getattr(text_config, "sliding_window", None),
        getattr(text_config, "layer_types", None),
    )
    if window is None:
        return None
    if layer_types:
        return (layer_types.index(_WINDOWED), int(window)) if _WINDOWED in layer_types else None
    # Mistral has no layer types, its window holds for all layers; transformers' Llama ignores the setting.
    return (0, int(window)) if text_config.model_type == "mistral" else None


def check_positions(
    text_config: Any,
    *,
    num_visual: int,
    max_text: int,
    max_new_tokens: int,
    schedule: Schedule = Schedule(),  # noqa: B008
    way_out: str = "lower --max-text or --max-new-tokens",
) -> None:
    """Raise ScheduleError if the longest sequence does not fit the decoder that ``check_decoder`` accepted.

    Args:
        text_config: transformers' configuration of the decoder.
        num_visual: Largest number of visual tokens.
        max_text: Largest prompt, in text tokens.
        max_new_tokens: Longest answer.
        schedule: Decides what reaches the layers with a window, which counts rows, not positions. A stage in front of
            such a layer probes it with the rows that it had before.
        way_out: Advice to the user, at the end of a message.
    """
    needed = num_visual + max_text + max_new_tokens
    parts = f"{needed} = {num_visual} visual + {max_text} text + {max_new_tokens} new"
    limit, rope_type = max_positions(text_config), _rope(text_config)["rope_type"]
    if needed > limit:
        reason = (
            f"where RoPE type {rope_type!r} begins to change with the length"
            if rope_type in _GROWING_ROPE_TYPES
            else "the model's limit"
        )
        raise ScheduleError(
            f"sequence: expected at most {limit} positions ({reason}), got {parts}; {way_out}"
        )
    windowed = sliding_window(text_config)
    if windowed is None:
        return
    layer, window = windowed
    left = schedule.tokens_per_layer(num_layers=int(text_config.num_hidden_layers), num_visual=num_visual)[
        max(layer - 1, 0)
    ]
    needed = left + max_text + max_new_tokens
    if needed > window:
        raise ScheduleError(
            f"sequence: expected at most {window} positions (the model's sliding window), got"
            f" {needed} = {left} visual + {max_text} text + {max_new_tokens} new in front of layer {layer};"
            f" {way_out}, or reduce earlier"
        )


def _rope(text_config: Any) -> dict[str, Any]:
    """Return the RoPE parameters; transformers has brought old forms (``rope_theta``, ``rope_scaling``) into this one."""
    return getattr(text_config, "rope_parameters", None) or {"rope_type": "default"}
