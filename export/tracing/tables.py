"""Inputs and outputs of the decoder's graphs as tables, which ``wiring.py`` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from trio_edge.runtime.bundle import graph_io as io

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import DType


class Row(NamedTuple):
    """A tensor in a table: its name, place, shape and type."""

    name: str
    place: str
    """After a dot at its end comes the name; after "@" comes a name, and what the graph before has written for it is read."""
    shape: tuple[int | str, ...]
    """Upper case stands for an axis of the graph, lower case for a size of the model or the stage."""
    dtype: DType | Literal["model"] = "int32"
    when: str = ""
    """Property of the graphs that have the tensor; empty for all."""


RANGE_INPUTS = (
    Row(io.EMBEDS, f"@{io.HIDDEN}", ("batch", "S", "width"), "model", "first"),
    Row(io.HIDDEN, f"@{io.HIDDEN}", ("batch", "S", "width"), "model", "later"),
    Row(io.POSITIONS, f"@{io.POSITIONS}", ("axes", "S"), "int32", "one answer"),
    Row(io.POSITIONS, f"@{io.POSITIONS}", ("axes", "batch", "S"), "int32", "several answers"),
    Row(io.PAST_LENGTH, "zeros.past_length", ("batch",)),
    Row(io.NUM_ROWS, "prompt.num_rows.{index}", ("batch",), "int32", "states"),
)
"""Before keys and values or states, and DeepStack planes."""
SELECT_INPUTS = (
    Row(io.HIDDEN, f"@{io.HIDDEN}", (1, "S", "width"), "model"),
    Row(io.POSITIONS, f"@{io.POSITIONS}", ("axes", "S")),
    Row(io.VISUAL_ROWS, f"@{io.VISUAL_ROWS}", ("N",)),
    Row(io.NUM_VISUAL, "prompt.num_visual.{stage}", (1,)),
    Row(io.LENGTH, "prompt.length.{stage}", (1,)),
    Row(io.PREVIOUS, f"@{io.PREVIOUS}", (1, "S", "width"), "model", "reads_previous"),
    Row(io.PROMPT_EMBEDS, "rows.embeds", (1, "F", "width"), "model", "reads_prompt"),
    Row(io.PROMPT_IS_VISUAL, "prompt.is_visual", ("F",), "int32", "reads_prompt"),
    Row(io.PROMPT_LENGTH, "prompt.length", (1,), "int32", "reads_prompt"),
    Row(io.SALIENCY, f"probe.{io.SALIENCY_SCORES}", ("N",), "float32", "has_probe"),
    Row(io.VISUAL_IMAGES, f"@{io.VISUAL_IMAGES}", ("N",), "int32", "image"),
)
SELECT_OUTPUTS = (
    Row(io.KEPT_HIDDEN, "{name}.", (1, "R", "width"), "model"),
    Row(io.KEPT_POSITIONS, "{name}.", ("axes", "R")),
    Row(io.KEPT_VISUAL_ROWS, "{name}.", ("keep",)),
    Row(io.KEPT_INDICES, f"results.{io.KEPT_INDICES}.{{stage}}", ("keep",)),
    Row(io.SCORES, f"results.{io.SCORES}.{{stage}}", ("N",), "float32"),
    Row(io.UNSETTLED, f"results.{io.UNSETTLED}.{{stage}}", (1,)),
    Row(io.KEPT_VISUAL_IMAGES, "{name}.", ("keep",), "int32", "image"),
)
_FORWARD_INPUTS = (
    Row(io.PROBE_HIDDEN, f"@{io.HIDDEN}", (1, "PS", "width"), "model"),
    Row(io.PROBE_POSITIONS, f"@{io.POSITIONS}", ("axes", "PS")),
    Row(io.PROBE_VISUAL_ROWS, f"@{io.VISUAL_ROWS}", ("PN",)),
    Row(io.PROBE_ROWS, "prompt.probe_rows.{stage}", ("PR",)),
    Row(io.PROBE_LENGTH, "prompt.length.{stage}", (1,)),
)
_FORWARD_OUTPUTS = (  # the output, then ``ProbeState`` of trio_edge.trio.saliency
    Row(io.PROBE_OUTPUT, "probe.", ("PR", "width"), "float32"),
    Row(io.PROBE_STATE, "probe.", ("PR", "state"), "float32"),
    Row(io.PROBE_ATTENTION, "probe.", ("heads", "PR", "PN"), "float32"),
    Row(io.PROBE_KEYS, "probe.", ("PN", "keys"), "float32", "needs_keys"),
)
_BACKWARD_INPUTS = (
    Row(io.GRADIENT_HIDDEN, f"@{io.HIDDEN}", (1, "GS", "width"), "model"),
    Row(io.GRADIENT_POSITIONS, f"@{io.POSITIONS}", ("axes", "GS")),
    Row(io.GRADIENT_VISUAL_ROWS, f"@{io.VISUAL_ROWS}", ("GN",)),
    Row(io.GRADIENT_NUM_VISUAL, "prompt.num_visual.{stage}", (1,)),
    Row(io.GRADIENT, f"probe.{io.OUTPUT_GRADIENT}", ("GR", "width"), "float32"),
    Row(io.GRADIENT_STATE, f"probe.{io.PROBE_STATE}", ("GR", "state"), "float32"),
    Row(io.GRADIENT_ATTENTION, f"probe.{io.PROBE_ATTENTION}", ("heads", "GR", "GN"), "float32"),
    Row(io.GRADIENT_KEYS, f"probe.{io.PROBE_KEYS}", ("GN", "keys"), "float32", "needs_keys"),
)
_BACKWARD_OUTPUTS = (Row(io.SALIENCY_SCORES, "probe.", ("GN",), "float32"),)
HALVES = {"probe": (_FORWARD_INPUTS, _FORWARD_OUTPUTS), "saliency": (_BACKWARD_INPUTS, _BACKWARD_OUTPUTS)}
GRADIENT_INPUTS = (
    Row(io.PROBE_OUTPUT, "probe.", ("GR", "width"), "float32"),
    Row(io.CANDIDATE_LOGITS, "likeliest.logits", ("GR", "candidates"), "float32", "quantized"),
    Row(io.CANDIDATE_ROWS, "likeliest.rows", ("GR", "candidates", "width"), "model", "quantized"),
)
GRADIENT_OUTPUTS = (Row(io.OUTPUT_GRADIENT, "probe.", ("GR", "width"), "float32"),)
HEAD_INPUTS = (
    Row(io.HIDDEN, f"{{name}}.{io.HIDDEN_OUT}", (1, "S", "width"), "model"),
    Row(io.LAST_ROW, "prompt.last_row", ("L",)),
)
HEAD_OUTPUTS = (
    Row(io.LOGITS, "results.", ("L", "vocab"), "float32"),
    Row(io.TOP_LOGITS, "results.", ("L", "candidates"), "float32"),
    Row(io.TOP_IDS, "results.", ("L", "candidates")),
    Row(io.LAST_HIDDEN, "hidden.", (1, "S", "width"), "model", "hidden"),
)
