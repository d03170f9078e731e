"""Names of the graphs' tensors, and the few things that follow from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import Dimensions, GraphSpec, Manifest

# Graphs before the decoder.
PIXEL_VALUES = "pixel_values"
TOKEN_INDEX = "token_index"
SPATIAL_SHAPES = "spatial_shapes"
TOKEN_WEIGHTS = "token_weights"
"""[N], the row of each visual token in what the vision encoder returns."""
PATCH_POSITIONS = "patch_positions"
TABLE_INDEX = "table_index"
TABLE_WEIGHTS = "table_weights"
NUM_PATCHES = "num_patches"
WINDOW_SLOTS = "window_slots"
PATCH_SLOT = "patch_slot"
"""Inputs of the Qwen-VL families: see ``export/graphs/vision``."""
VISUAL_TOKENS = "visual_tokens"
KEPT_PATCHES = "kept_patches"
KEPT_TOKENS = "kept_tokens"
"""Output of a graph that drops tokens: the kept patches of each tile, or the kept visual tokens of the image."""
PREVIOUS_TOKENS = "previous_tokens"
"""Input of a reduce graph that compares frames: ``VISUAL_TOKENS`` of the previous pair of frames."""
HAS_PREVIOUS = "has_previous"
"""[1], 0 for an image and for the first pair of frames, for which ``PREVIOUS_TOKENS`` mean nothing."""
REDUCED_TOKENS = "reduced_tokens"
DEEPSTACK_TOKENS = "deepstack_tokens."
REDUCED_DEEPSTACK = "reduced_deepstack_tokens."
"""Prefixes of the DeepStack planes that belong to ``VISUAL_TOKENS`` and ``REDUCED_TOKENS``; a number follows."""
IS_NEWLINE = "is_newline"
"""[N], 1 at tokens that end a row of the image."""
TEXT_EMBEDS = "text_embeds"
NUM_TEXT = "num_text"
CLIP_TEXT: Literal["clip_text"] = "clip_text"
"""Name and role of the text tower's graph."""
CLIP_IDS = "clip_ids"
CLIP_TEXTS = "clip_texts"
CLIP_PATCHES = "clip_patches"
TEXT_MARKS = "text_marks"

# Decoder layer ranges.
EMBEDS = "inputs_embeds"
"""Input of the range that starts at layer 0; the other ranges read ``HIDDEN``."""
HIDDEN = "hidden_states"
POSITIONS = "position_ids"
PAST_LENGTH = "past_length"
PAST_PREFIX = "past_key_values."
HIDDEN_OUT = "hidden_states_out"
PRESENT_PREFIX = "present."
NUM_ROWS = "num_rows"
"""[B], real rows of each answer, in a decoder with states."""
PAST_STATES = "past_states."
PRESENT_STATES = "present_states."
"""Prefixes of the states of a layer with linear attention; its number follows, and ".conv" or ".delta"."""
DEEPSTACK = "deepstack_embeds."
"""DeepStack plane of layer i, ``deepstack_embeds.{i}``: rows that are added to the layer's output, 0 at text."""
PREVIOUS = "previous_hidden_states"
"""Hidden states that entered the layer before a stage's layer: output of a range, input of the select graph after it."""

# Probes: the forward half returns a layer's output on the probe rows, the backward half takes the gradient of that output.
PROBE_HIDDEN = "probe_hidden_states"
PROBE_POSITIONS = "probe_position_ids"
PROBE_VISUAL_ROWS = "probe_visual_rows"
PROBE_ROWS = "probe_rows"
PROBE_LENGTH = "probe_length"
PROBE_OUTPUT = "probe_output"
PROBE_STATE = "probe_state"
PROBE_ATTENTION = "probe_attention"
PROBE_KEYS = "probe_keys"
PROBE_RESULTS = (PROBE_OUTPUT, PROBE_STATE, PROBE_ATTENTION, PROBE_KEYS)
"""Outputs of the forward half; the keys only where the backward half reads them."""
GRADIENT_HIDDEN = "gradient_hidden_states"
GRADIENT_POSITIONS = "gradient_position_ids"
GRADIENT_VISUAL_ROWS = "gradient_visual_rows"
GRADIENT_NUM_VISUAL = "gradient_num_visual"
GRADIENT = "gradient"
GRADIENT_STATE = "gradient_state"
GRADIENT_ATTENTION = "gradient_attention"
GRADIENT_KEYS = "gradient_keys"
SALIENCY_SCORES = "saliency_scores"
OUTPUT_GRADIENT = "output_gradient"
"""The head's gradient with respect to ``PROBE_OUTPUT``."""

# A quantized head: the gradient of the loss over the likeliest tokens, whose logits and rows of the lm_head are given.
CANDIDATES = "candidates"
"""The head's profile on all probe rows."""
CANDIDATE_LOGITS = "candidate_logits"
CANDIDATE_ROWS = "candidate_rows"

# Select graphs.
SALIENCY = "saliency"
"""Scores of a probe, if the stage has one."""
VISUAL_ROWS = "visual_rows"
NUM_VISUAL = "num_visual"
LENGTH = "length"
PROMPT_EMBEDS = "prompt_embeds"
PROMPT_IS_VISUAL = "prompt_is_visual"
PROMPT_LENGTH = "prompt_length"
KEPT_HIDDEN = "kept_hidden_states"
KEPT_POSITIONS = "kept_position_ids"
KEPT_VISUAL_ROWS = "kept_visual_rows"
"""Row of each kept token in the reduced sequence: ``VISUAL_ROWS`` of the next stage."""
VISUAL_IMAGES = "visual_images"
"""Image of each visual token, where each image has a share of the kept tokens."""
KEPT_VISUAL_IMAGES = "kept_visual_images"
"""Image of each kept token: ``VISUAL_IMAGES`` of the next stage."""
KEPT_DEEPSTACK = "kept_deepstack_embeds."
"""DeepStack planes of layers after the stage, without the dropped tokens."""
KEPT_INDICES = "kept_indices"
SCORES = "scores"
UNSETTLED = "unsettled"
SELECT_RESULTS = (KEPT_INDICES, SCORES, UNSETTLED)
"""Outputs that the host reads; the other outputs stay on the device."""

# Head.
LAST_ROW = "last_row"
LOGITS = "logits"
LAST_HIDDEN = "last_hidden_states"
"""Output with --outputs hidden: all rows after the final norm."""
TOP_LOGITS = "top_logits"
TOP_IDS = "top_ids"

MAX_CANDIDATES = 64
"""Largest T, the number of likeliest tokens: room for top-k sampling and for ties in float16."""
WORD, END = 1, 2
"""Marks of the tokens in CLIP's texts: a word, and the end, which stands for the whole text; 0 is the start or padding."""


def num_candidates(dimensions: Dimensions) -> int:
    """Return T, the number of most likely tokens that the head returns for a row."""
    return min(MAX_CANDIDATES, dimensions.vocab_size)


def is_probe(spec: GraphSpec) -> bool:
    """Return whether a graph, or a piece of one, belongs to a probe alone."""
    return {tensor.name for tensor in spec.outputs} <= {*PROBE_RESULTS, OUTPUT_GRADIENT, SALIENCY_SCORES}


def token_outputs(role: str, num_deepstack: int) -> list[str]:
    """Return the outputs of a vision or reduce graph: visual tokens and their DeepStack planes."""
    is_vision = role == "vision"
    tokens, planes = (VISUAL_TOKENS, DEEPSTACK_TOKENS) if is_vision else (REDUCED_TOKENS, REDUCED_DEEPSTACK)
    return [tokens, *(f"{planes}{plane}" for plane in range(num_deepstack))]


def gradient_graph(manifest: Manifest) -> GraphSpec | None:
    """Return the graph that holds the head's gradient, if there is a probe."""
    return next(
        (spec for spec in manifest.graphs if any(tensor.name == OUTPUT_GRADIENT for tensor in spec.outputs)),
        None,
    )


def goes_around_mlp(spec: GraphSpec) -> bool:
    """Return whether the gradient of the probe in ``spec`` goes around the layer's MLP: its halves are in two graphs."""
    return not {PROBE_HIDDEN, GRADIENT_HIDDEN} <= set(spec.input_names)


STEP_ROWS = (1, 2, 4, 8)
"""Possible rows of a decode step: a new token, and drafts of the tokens after it."""
SMALL_FOLLOW_UPS = (8, 16, 32)
"""Rows of questions that follow kept rows, besides the text buckets."""
MAX_TEXT = 256
"""Default limit of a prompt in text tokens."""
# Every bucket adds a profile to every engine. Doubling sizes waste less than half of a prompt's rows.
_SMALLEST_BUCKET = 32


def text_buckets(max_text: int) -> tuple[int, ...]:
    """Return the text sizes that prompts are padded to: 32, 64, 128, … and ``max_text``."""
    sizes, size = [], _SMALLEST_BUCKET
    while size < max_text:
        sizes.append(size)
        size *= 2
    return (*sizes, max_text)


def bucket_of(num_text: int, buckets: Sequence[int]) -> int:
    """Return the first of the ascending ``buckets`` with room for ``num_text`` tokens, or ``num_text`` if there is none."""
    return next((bucket for bucket in buckets if bucket >= num_text), num_text)


def num_clip_texts(num_tokens: int, *, length: int) -> int:
    """Return M, the number of texts of ``length`` tokens, including start and end, for a question of ``num_tokens``."""
    return max(1, -(-num_tokens // (length - 2)))
