"""Downloads a checkpoint from the Hub with ``huggingface_hub``, which handles cache, token, offline mode and progress.

``download_description`` gets configuration and tokenizer, a few megabytes, so that an unsupported model is refused before
its weights are downloaded. ``download_weights`` then gets exactly the safetensors files that the index names. Pickles and
code are never downloaded.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

SAFETENSORS_WAY_OUT = (
    "save it once with transformers, AutoModelForImageTextToText.from_pretrained(OLD).save_pretrained(NEW) (CLIPModel"
    " for --clip), and name NEW"
)


def download_description(repository: str, *, revision: str | None) -> Path:
    """Return the cached snapshot folder of ``repository``, without weights; its name is the commit.

    Raises:
        CheckpointError: If the Hub refuses, or it cannot be reached and the cache has no copy.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=["*.json", "*.jinja", "tokenizer.model"],
                ignore_patterns=["*/*"],  # folders hold other formats and original code
            )
        )
    except Exception as error:  # releases of huggingface_hub raise errors of different HTTP libraries
        raise _explained(error, repository, revision=revision) from None


def download_weights(repository: str, names: Sequence[str], *, snapshot: Path) -> None:
    """Download the files ``names`` of ``repository`` into ``snapshot``, unless they are there.

    One file after the other, so that Ctrl-C ends the download at once; each large file is downloaded in parallel.

    Raises:
        CheckpointError: If a file is neither on the Hub nor in the cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        if (snapshot / name).exists():
            continue
        try:
            hf_hub_download(repository, name, revision=snapshot.name)
        except LocalEntryNotFoundError:
            raise CheckpointError(
                f"{repository}: expected {name} in the cache, as the Hub cannot be reached, got an incomplete copy"
                f" ({snapshot}); run again with a connection"
            ) from None
        except EntryNotFoundError:
            raise CheckpointError(
                f"{repository}: expected {name} (only safetensors are read, never pickles), got a repository without it;"
                f" {SAFETENSORS_WAY_OUT}"
            ) from None
        except Exception as error:
            raise _explained(error, repository, revision=snapshot.name) from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _explained(error: Exception, repository: str, *, revision: str | None) -> CheckpointError:
    """Return a failed download as one line that says what to do."""
    from huggingface_hub import errors

    at = "" if revision is None else f" at revision {revision!r}"
    reasons: dict[type[Exception], str] = {  # a subclass comes before its base
        errors.HFValidationError: "expected a Hub id (owner/name), got a malformed one; check the spelling",
        errors.GatedRepoError: "expected access to this gated repository, got none; accept its terms on"
        f" https://huggingface.co/{repository}, then 'hf auth login' or set HF_TOKEN",
        errors.RepositoryNotFoundError: "expected a Hub repository or a local folder, got neither (or a private one); check the"
        " spelling, or 'hf auth login' or set HF_TOKEN",
        errors.RevisionNotFoundError: f"expected a branch, tag or commit for --revision, got {revision!r}; check the spelling",
        errors.LocalEntryNotFoundError: f"expected the Hub or a complete cached copy{at}, got no connection and none in the cache;"
        " download it first or name a local folder",
        errors.HfHubHTTPError: f"expected a download, got '{first_line(error)}' from the Hub; try again later",
    }
    reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
    if reason is None and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "expected room in the Hub's cache, got a full disk; free some space or set HF_HOME to another disk"
    reason = reason or f"expected a download, got '{first_line(error)}'; try again"
    return CheckpointError(f"{repository}: {reason}")
