"""Takes the tokenizer and the chat template from a checkpoint and writes them into a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trio_edge.export.checkpoint import read_json
from trio_edge.runtime.errors import CheckpointError
from trio_edge.runtime.manifest import TextSpec

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.export.checkpoint import Checkpoint

TOKENIZER_NAME = "tokenizer.json"
TEMPLATE_NAME = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFiles:
    """What a bundle holds about text: the manifest's part, and two files."""

    spec: TextSpec
    tokenizer: str
    chat_template: str

    def write(self, bundle: Path) -> None:
        """Write both files."""
        (bundle / TOKENIZER_NAME).write_text(self.tokenizer, encoding="utf-8")
        (bundle / TEMPLATE_NAME).write_text(self.chat_template, encoding="utf-8")


def read_text_files(checkpoint: Checkpoint, *, default_template: str) -> TextFiles:
    """Return the tokenizer and the chat template of a checkpoint.

    The tokenizer is the one that transformers uses for this checkpoint, saved as one file: some releases build parts
    of it in code, so the checkpoint's own tokenizer.json alone may tokenize differently.

    Raises:
        CheckpointError: If there is no tokenizer, or its image token is not a single known token.
    """
    tokenizer = _load_tokenizer(checkpoint)
    backend = tokenizer.backend_tokenizer
    image_token_id = checkpoint.config.get("image_token_index", checkpoint.config.get("image_token_id"))
    image_token = backend.id_to_token(image_token_id) if isinstance(image_token_id, int) else None
    if image_token is None or not isinstance(image_token_id, int):
        raise CheckpointError(
            f"{checkpoint.folder}: expected image_token_index to name a token of the tokenizer, got {image_token_id};"
            " use the checkpoint's own tokenizer files"
        )
    backend.no_padding()
    backend.no_truncation()
    spec = TextSpec(
        tokenizer=TOKENIZER_NAME,
        chat_template=TEMPLATE_NAME,
        image_token=image_token,
        image_token_id=image_token_id,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        stop_token_ids=_stop_token_ids(checkpoint, tokenizer),
    )
    template = _chat_template(checkpoint) or default_template
    return TextFiles(spec=spec, tokenizer=backend.to_str(), chat_template=template)


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types for missing or broken files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{checkpoint.folder}: expected tokenizer files, got none that load ({reason}); download them"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{checkpoint.folder}: expected a tokenizer with tokenizer.json, got a slow one;"
            " save it as a fast tokenizer first"
        )
    return tokenizer


def _chat_template(checkpoint: Checkpoint) -> str | None:
    """Return the checkpoint's template from the places where transformers has kept it over time."""
    folder = checkpoint.folder
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, str):
                return template
    return None


def _stop_token_ids(checkpoint: Checkpoint, tokenizer: Any) -> tuple[int, ...]:
    path = checkpoint.folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.exists() else None
    if ids is None:
        ids = checkpoint.config.get("text_config", {}).get("eos_token_id")
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
