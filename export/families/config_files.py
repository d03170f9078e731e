"""Reads a checkpoint's configuration files for the families: model and image processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from trio_edge.export.checkpoints.checkpoint import read_json
from trio_edge.export.checkpoints.hub import first_line
from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint

_A = {"image_processor": "an image processor", "video_processor": "a video processor"}


def load_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration of ``checkpoint``.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a broken config.json
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: expected a valid configuration, got '{first_line(error)}'; download it again"
        ) from None
    _forget_dtype(config)
    return config


def _forget_dtype(config: Any) -> None:
    """Clear the element type of ``config`` and its parts, because the exporter chooses one for all.

    transformers would build each part in its own type. In a released Qwen2.5-VL the type holds for the decoder only.
    """
    config.dtype = None
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None:
            _forget_dtype(part)


def read_image_processor(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the image processor's constants, from ``preprocessor_config.json`` or transformers 5's ``processor_config.json``.

    Raises:
        CheckpointError: If neither is there.
    """
    return _processor(checkpoint, "image_processor", "preprocessor_config.json")


def read_video_processor(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the video processor's constants, or the image processor's if there are none.

    They are in ``video_preprocessor_config.json`` or transformers 5's ``processor_config.json``.

    Raises:
        CheckpointError: If all files are missing.
    """
    return _processor(
        checkpoint, "video_processor", "video_preprocessor_config.json", "preprocessor_config.json"
    )


def _processor(checkpoint: Checkpoint, part: str, *names: str) -> dict[str, Any]:
    folder = checkpoint.folder
    values: Any = None
    # as transformers, reads the newer file first: saving again does not delete the older ones
    if (folder / "processor_config.json").exists():
        values = read_json(folder / "processor_config.json").get(part)
    for name in names:
        if values is None and (folder / name).exists():
            values = read_json(folder / name)
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{folder}: expected {names[-1]} or processor_config.json with {_A[part]}, got none;"
            " download it with the weights"
        )
    return values
