"""Reads what a checkpoint says about text: its tokenizer, its chat template and its generation settings."""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from trio_edge.export.checkpoints.checkpoint import EMBEDDING_NAME, read_json
from trio_edge.export.checkpoints.hub import first_line
from trio_edge.runtime.bundle.errors import BundleError, CheckpointError
from trio_edge.runtime.bundle.generation import SAMPLING_SETTINGS, GenerationSettings
from trio_edge.runtime.bundle.manifest import DecisionSpec, TextSpec
from trio_edge.runtime.bundle.reader import MAX_TEXT_BYTES, read_regular
from trio_edge.runtime.decisions.wording import LETTERS_TEMPLATE, WORDING_VERSION, WORDS_TEMPLATE
from trio_edge.runtime.prompts.chat import compile_template
from trio_edge.runtime.prompts.tokenizer import MAX_TOKENIZER_BYTES, only_bundle_errors, tokenizer_from

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.export.checkpoints.checkpoint import Checkpoint

TOKENIZER_NAME = "tokenizer.json"
TEMPLATE_NAME = "chat_template.jinja"
DECISION_TEMPLATE_NAME = "decision_template.jinja"
_GENERATION_NAME = "generation_config.json"
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
    "num_return_sequences": (1,),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static"),
}
"""Generation settings that the runtime does not implement, and their values besides None that have no effect."""
_OLD_MAX_LENGTH = 20  # transformers 4 wrote this default of its own into every config.json
_NEUTRAL_IF_SAMPLED: dict[str, tuple[Any, ...]] = {
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFiles:
    """The manifest's description of a bundle's text, and the contents of two files."""

    spec: TextSpec
    tokenizer: str
    chat_template: str
    decisions: DecisionSpec
    decision_template: str


def read_text_files(
    checkpoint: Checkpoint, *, default_template: str, image_marks: tuple[str, str] = ("", "")
) -> TextFiles:
    """Return the tokenizer and the chat template of a checkpoint.

    The tokenizer is the one that transformers uses, saved as one file. Some releases build parts of it in code, so the
    checkpoint's own tokenizer.json may tokenize differently.

    Args:
        checkpoint: The checkpoint.
        default_template: Chat template for a checkpoint without one.
        image_marks: Texts added to the template before and after its image token.

    Raises:
        CheckpointError: If there is no tokenizer, its image token is unknown or missing in a template that needs marks,
            or it has tokens without a row in the embedding table.
    """
    folder, config = checkpoint.folder, checkpoint.config
    tokenizer = load_tokenizer(checkpoint)
    backend = tokenizer.backend_tokenizer
    _check_rules(backend.to_str().encode(), where=folder)
    image_id: Any = config.get("image_token_index", config.get("image_token_id"))
    image_token = _token(backend, image_id)
    if image_token is None:
        raise CheckpointError(
            f"{folder}: expected image_token_index to be the id of a token, got {image_id};"
            " use the checkpoint's own tokenizer files"
        )
    video_id: Any = config.get("video_token_id")
    video_token = _token(backend, video_id)
    template = _with_special_tokens(_chat_template(folder) or default_template, tokenizer)
    if any(image_marks):  # no processor adds them at run time
        template = _marked(template, image_token, image_marks, folder)
    spec = TextSpec(
        tokenizer=TOKENIZER_NAME,
        chat_template=TEMPLATE_NAME,
        image_token=image_token,
        image_token_id=image_id,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        stop_token_ids=_stop_token_ids(checkpoint),
        video_token=video_token,
        video_token_id=None if video_token is None else video_id,
    )
    _check_vocabulary(checkpoint, backend)
    decisions, decision_template = _decision_template(folder, backend)
    return TextFiles(
        spec=spec,
        tokenizer=backend.to_str(),
        chat_template=template,
        decisions=decisions,
        decision_template=decision_template,
    )


def _marked(template: str, image_token: str, marks: tuple[str, str], folder: Path) -> str:
    """Return the template with ``marks`` around its image token."""
    if image_token not in template:
        raise CheckpointError(
            f"{folder}: expected a chat template with the image token {image_token!r}, got one without it; use the"
            " template of the checkpoint's newest revision"
        )
    return template.replace(image_token, image_token.join(marks))


def _token(backend: Any, token_id: Any) -> str | None:
    """Return the token with this id; None if it is none."""
    token: str | None = None
    if isinstance(token_id, int) and 0 <= token_id < 1 << 31:
        token = backend.id_to_token(token_id)
    return token


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the fast tokenizer that transformers uses for a checkpoint, without padding and truncation.

    Raises:
        CheckpointError: If its files are missing or broken, or it is not a fast tokenizer.
    """
    from transformers import AutoTokenizer

    if (file := checkpoint.folder / TOKENIZER_NAME).exists():
        _check_rules(_read_text(file, max_bytes=MAX_TOKENIZER_BYTES).encode(), where=file)
    try:
        with only_bundle_errors(str(checkpoint.folder)):
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises many types for missing or broken files
        raise CheckpointError(
            f"{checkpoint.folder}: expected tokenizer files, got none that load ({first_line(error)}); download them again"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{checkpoint.folder}: expected a tokenizer with tokenizer.json, got a slow one;"
            " save it as a fast tokenizer first"
        )
    # some checkpoints set both; the runtime pads to its own buckets and refuses prompts that are too long
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def _read_text(path: Path, *, max_bytes: int) -> str:
    try:
        return read_regular(path, max_bytes=max_bytes).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected UTF-8 text, got {error}; download it again") from None


def _check_rules(content: bytes, *, where: Path) -> None:
    """Raise CheckpointError if the runtime refuses this tokenizer."""
    try:
        tokenizer_from(content, where=str(where))
    except BundleError as error:
        reason = str(error).removesuffix("; export the bundle again")
        raise CheckpointError(f"{reason}; use the checkpoint's own tokenizer files") from None


def _with_special_tokens(template: str, tokenizer: Any) -> str:
    """Return the template with its special tokens set; the manifest holds only the begin and end tokens."""
    texts = (
        f"{{% set {name} = {json.dumps(str(token))} %}}"
        for name, token in tokenizer.special_tokens_map.items()
        if name not in ("bos_token", "eos_token") and re.search(rf"\b{re.escape(name)}\b", template)
    )
    return "".join(texts) + template


def _chat_template(folder: Path) -> str | None:
    """Return the checkpoint's template, from one of the files in which releases of transformers store it."""
    if (folder / TEMPLATE_NAME).exists():
        return _read_text(folder / TEMPLATE_NAME, max_bytes=MAX_TEXT_BYTES)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            template = read_json(folder / name).get("chat_template")
            if template is not None:
                return _default_template(template, folder / name)
    return None


def _decision_template(folder: Path, backend: Any) -> tuple[DecisionSpec, str]:
    """Return the wording of questions: the checkpoint's own, or one that its tokenizer can answer."""
    known = all(
        backend.decode(backend.encode(label, add_special_tokens=False).ids).strip() == label
        for label in (*string.ascii_uppercase, *string.digits)
    )
    version, template = WORDING_VERSION, LETTERS_TEMPLATE if known else WORDS_TEMPLATE
    if (folder / DECISION_TEMPLATE_NAME).exists():
        version = "own"
        template = _read_text(folder / DECISION_TEMPLATE_NAME, max_bytes=MAX_TEXT_BYTES)
        compile_template(template, what="decision template")
    # The model cannot answer with letters that the prompt does not show.
    labels: Literal["letters", "words"] = "letters" if known and "label" in template else "words"
    return DecisionSpec(version=version, template=DECISION_TEMPLATE_NAME, labels=labels), template


def _default_template(template: Any, path: Path) -> str:
    """Return ``template`` itself, or the one called "default" if it holds several."""
    if isinstance(template, list):  # transformers 4 wrote several as a list of objects
        template = {part.get("name"): part.get("template") for part in template if isinstance(part, dict)}
    text = template.get("default") if isinstance(template, dict) else template
    if not isinstance(text, str):
        raise CheckpointError(
            f"{path} chat_template: expected Jinja text, or several with one called 'default', got"
            f" {', '.join(map(str, template)) if isinstance(template, dict) else type(template).__name__};"
            " write the template into chat_template.jinja"
        )
    return text


def _stop_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the tokens that end an answer: those in ``generation_config.json`` or, without it, the configuration's."""
    path, config = checkpoint.folder / _GENERATION_NAME, checkpoint.config
    places = (read_json(path),) if path.exists() else (config, config.get("text_config") or {})
    ids = next((place["eos_token_id"] for place in places if place.get("eos_token_id") is not None), ())
    found = tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
    if not all(isinstance(token_id, int) and 0 <= token_id < 1 << 31 for token_id in found):
        raise CheckpointError(
            f"{checkpoint.folder}: expected eos_token_id to be token ids, got {ids!r:.200}; correct generation_config.json"
        )
    return found


def read_generation(checkpoint: Checkpoint) -> GenerationSettings:
    """Return the checkpoint's generation settings, or Hugging Face's defaults if it has none.

    As for ``generate``, the model's configuration is read only if there is no ``generation_config.json``.

    Raises:
        CheckpointError: If they cannot be read, or the runtime does not implement one.
    """
    path, config = checkpoint.folder / _GENERATION_NAME, checkpoint.config
    text_config = config.get("text_config")
    places = [read_json(path)] if path.exists() else [text_config, config]
    places = [place for place in places if isinstance(place, dict)]
    values = {key: value for place in places for key, value in place.items() if value is not None}
    if not path.exists():
        path = checkpoint.folder / "config.json"
        if values.get("max_length") == _OLD_MAX_LENGTH:
            values.pop("max_length")
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
    for first, other in (("min_new_tokens", "min_length"), ("max_new_tokens", "max_length")):
        if first in wanted:  # even 0 has precedence
            wanted.pop(other, None)
    if not wanted.get("do_sample"):  # files often keep sampling settings that have no effect
        wanted = {name: value for name, value in wanted.items() if name not in SAMPLING_SETTINGS}
    try:
        return msgspec.convert(wanted, GenerationSettings)
    except (msgspec.ValidationError, UnicodeError) as error:  # the second for lone surrogates
        raise CheckpointError(
            f"{path}: expected generation settings in range, got '{error}'; correct the file"
        ) from None


def _check_vocabulary(checkpoint: Checkpoint, backend: Any) -> None:
    """Raise CheckpointError if a token has no row in the embedding table; rows without a token are allowed."""
    num_rows = checkpoint.tensor(EMBEDDING_NAME).shape[0]
    token, token_id = max(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if token_id >= num_rows:
        raise CheckpointError(
            f"{checkpoint.folder}: expected token ids below {num_rows} (rows of the embedding table), got {token_id} for"
            f" {token!r}; resize the embeddings (resize_token_embeddings) or use the checkpoint's own tokenizer files"
        )
