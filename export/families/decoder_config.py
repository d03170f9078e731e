"""Checks a decoder's configuration for what the graphs replace: rotary tables and attention masks.

Everything else comes with transformers' own layers, which the graphs wrap: biases, head sizes that differ from
``hidden_size / num_attention_heads``, tied embeddings. Rotary frequencies are constants of a graph, so RoPE types whose
frequencies depend on the sequence length are exported only for lengths at which they are constant. The graphs' causal mask
has no window, so a model with a sliding window is exported only for sequences that fit the window.

| RoPE type                  | exported                                                                |
|----------------------------|-------------------------------------------------------------------------|
| default, linear, llama3    | yes                                                                     |
| yarn                       | yes, with its factor on the tables                                      |
| dynamic                    | up to ``max_position_embeddings``, where it equals the default type     |
| longrope                   | up to ``original_max_position_embeddings``, with its short factors      |
| others, partial, per layer | no                                                                      |
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
    """Raise CheckpointError if the decoder that ``text_config`` describes is not supported at any length."""
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
    """Set ``config.tie_word_embeddings``, of the whole model, to False if the checkpoint stores a head.

    Fine-tuned checkpoints may claim tied embeddings and hold a head that differs; transformers then uses this head.
    """
    config.tie_word_embeddings = config.tie_word_embeddings and HEAD_NAME not in checkpoint.tensors


def max_positions(text_config: Any) -> int:
    """Return the number of positions that the decoder supports.

    It is ``max_position_embeddings``, or the RoPE scaling's factor times its original length if that is more, since only
    some checkpoints raise the former with the latter.
    """
    limit, rope = int(text_config.max_position_embeddings), _rope(text_config)
    if rope["rope_type"] == "longrope":
        return int(rope["original_max_position_embeddings"])
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if rope["rope_type"] in ("yarn", "llama3") and original and factor:
        return max(limit, int(original * factor))
    return limit


def sliding_window(text_config: Any) -> tuple[int, int] | None:
    """Return the first layer with a sliding window and the window in rows; None if there is none."""
    layer_types = getattr(text_config, "layer_types", None)
    if (window := getattr(text_config, "sliding_window", None)) is None:
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
    """Raise ScheduleError if the longest sequence does not fit a decoder that ``check_decoder`` accepts.

    Args:
        text_config: transformers' configuration of the decoder.
        num_visual: Largest number of visual tokens.
        max_text: Largest prompt, in text tokens.
        max_new_tokens: Longest answer, in tokens.
        schedule: Determines the rows that reach layers with a window, which counts rows and not positions. A stage probes
            such a layer with the rows before the stage.
        way_out: Advice at the end of a message.
    """
    needed = num_visual + max_text + max_new_tokens
    parts = f"{needed} = {num_visual} visual + {max_text} text + {max_new_tokens} new"
    limit, rope_type = max_positions(text_config), _rope(text_config)["rope_type"]
    if needed > limit:
        reason = (
            f"beyond it RoPE type {rope_type!r} depends on the length"
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
            f" {needed} = {left} visual + {max_text} text + {max_new_tokens} new before layer {layer};"
            f" {way_out}, or reduce earlier"
        )


def _rope(text_config: Any) -> dict[str, Any]:
    """Return the RoPE parameters; transformers converts older forms (``rope_theta``, ``rope_scaling``) to this one."""
    return getattr(text_config, "rope_parameters", None) or {"rope_type": "default"}
