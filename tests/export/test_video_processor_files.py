"""The video processor's constants are read from the file that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers.video_processing_utils import VideoProcessorMixin

from trio_edge.export.families.base import read_video_processor
from trio_edge.runtime.bundle.errors import CheckpointError


class Folder(NamedTuple):
    """All of a checkpoint that is read here."""

    folder: Path


FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {"fps": 1},
    "video_preprocessor_config.json": {"fps": 2},
    "processor_config.json": {"video_processor": {"fps": 3}, "image_processor": {"fps": 4}},
}


@pytest.mark.parametrize("names", [list(FILES)[:count] for count in (1, 2, 3)], ids=str)
def test_the_file_is_the_one_that_transformers_reads(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps(FILES[name]))
    theirs, _ = VideoProcessorMixin.get_video_processor_dict(tmp_path, local_files_only=True)
    assert read_video_processor(Folder(tmp_path)) == theirs == {"fps": len(names)}  # type: ignore[arg-type]


def test_a_processor_file_without_videos_leaves_it_to_the_others(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"fps": 4}}))
    with pytest.raises(CheckpointError, match=r"or processor_config.json with a video processor, got none"):
        read_video_processor(Folder(tmp_path))  # type: ignore[arg-type]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"fps": 1}))
    assert read_video_processor(Folder(tmp_path)) == {"fps": 1}  # type: ignore[arg-type]
