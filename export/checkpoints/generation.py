"""Reads a checkpoint's generation settings, and refuses those that the runtime does not implement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from trio_edge.export.checkpoints.checkpoint import read_json
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.generation import SAMPLING_SETTINGS, GenerationSettings

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint

_FILE = "generation_config.json"
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "bad_words_ids": ([],),
    "sequence_bias": ({},),
    "guidance_scale": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "stop_strings": (),
    "max_time": (),
    "token_healing": (False,),
    "watermarking_config": (),
    "prompt_lookup_num_tokens": (),
}
"""Unsupported settings, and their values besides None that have no effect."""
_NEUTRAL_IF_SAMPLED: dict[str, tuple[Any, ...]] = {
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}


def read_generation(checkpoint: Checkpoint) -> GenerationSettings:
    """Return the checkpoint's settings, or Hugging Face's defaults if it has none.

    Raises:
        CheckpointError: If they cannot be read, or one is not supported.
    """
    path = checkpoint.folder / _FILE
    if not path.exists():
        return GenerationSettings()
    values = {key: value for key, value in read_json(path).items() if value is not None}
    unknown = _NEUTRAL | (_NEUTRAL_IF_SAMPLED if values.get("do_sample") else {})
    for name, neutral in unknown.items():
        if name in values and values[name] not in neutral:
            raise CheckpointError(
                f"{path} {name}: expected none, got {values[name]!r}, which the runtime does not implement; remove it to export"
                " without it (answers would differ from the checkpoint's)"
            )
    wanted = {name: values[name] for name in GenerationSettings.__struct_fields__ if name in values}
    if isinstance(wanted.get("forced_eos_token_id"), int):
        wanted["forced_eos_token_id"] = [wanted["forced_eos_token_id"]]
    if "min_new_tokens" in wanted:  # even 0 has precedence
        wanted.pop("min_length", None)
    if not wanted.get("do_sample"):  # files often keep sampling settings that have no effect
        wanted = {name: value for name, value in wanted.items() if name not in SAMPLING_SETTINGS}
    try:
        return msgspec.convert(wanted, GenerationSettings)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{path}: expected generation settings in range, got '{error}'; correct the file"
        ) from None
