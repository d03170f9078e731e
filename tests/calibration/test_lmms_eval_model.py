"""lmms-eval runs a local task through a bundle, found by the package's entry point. Needs lmms-eval, which CI does not install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import pytest

from tests.bundles import export
from tests.calibration.question_files import questions_about, write_questions
from tests.pictures import random_picture
from tests.qwen_checkpoints import save_qwen3_vl_checkpoint
from trio_edge.calibration.evaluate import cli as cli_eval
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

TASK = """
task: trio_edge_local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 16, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """
from pathlib import Path
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(Path(__file__).parent / name) for name in doc["images"]]
"""


VIDEO_FUNCTIONS = """
from pathlib import Path

def doc_to_visual(doc):
    return [str(Path(__file__).parent / name) for name in doc["images"]]
"""


def test_the_package_names_its_model_for_lmms_eval() -> None:
    (found,) = (entry for entry in entry_points(group="lmms_eval.models") if entry.name == "trio_edge")
    assert found.value == "trio_edge.calibration.evaluate.lmms_eval_model:manifest"


def test_lmms_eval_gets_the_answers_that_trio_eval_gets(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="needs pip install lmms-eval")
    schedule = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))
    bundle = export(checkpoint, schedule=schedule, max_images=2)
    lines = [
        {"question": line["question"], "answer": line["answer"], "images": ["p0.png", "p1.png"][: 1 + i % 2]}
        for i, line in enumerate(questions_about(6))
    ]
    data = write_questions(tmp_path, lines)
    (tmp_path / "local.yaml").write_text(TASK.replace("DATA", str(data)))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    theirs = answers_of_lmms_eval(tmp_path, f"pretrained={bundle},threads=1")
    report = tmp_path / "report.json"
    arguments = [str(bundle), "--data", str(data), "--json", str(report), "--quiet"]
    assert cli_eval.main(arguments) == 0
    outcomes = json.loads(report.read_text())["runs"][0]["outcomes"]
    assert theirs == [outcome["text"].strip() for outcome in outcomes]


def test_a_video_file_of_a_task_is_a_video_and_its_costs_are_reported(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="needs pip install lmms-eval")
    schedule = Schedule(stages=(Stage(layer=2, keep=3),), positions="preserved")
    bundle = export(save_qwen3_vl_checkpoint(tmp_path / "ck"), schedule=schedule, max_frames=6, max_text=128)
    (tmp_path / "clip").mkdir()
    for number in range(6):
        random_picture(60, 40, seed=number).save(tmp_path / "clip" / f"{number}.png")
    data = write_questions(tmp_path, [{"question": "w1 w2", "answer": "w3", "images": ["clip"]}])
    (tmp_path / "local.yaml").write_text(TASK.replace("DATA", str(data)))
    (tmp_path / "functions.py").write_text(VIDEO_FUNCTIONS)
    costs = tmp_path / "costs.json"
    settings = f'pretrained={bundle},threads=1,num_frames=6,report={costs},system="w9, w8"'
    (theirs,) = answers_of_lmms_eval(tmp_path, settings)
    with Pipeline.from_bundle(bundle, threads=1) as pipeline:
        generation = pipeline.generate(
            None, "w1 w2", video=tmp_path / "clip", num_frames=6, system="w9, w8", max_new_tokens=16
        )
        assert generation.text.strip() == theirs
    found = json.loads(costs.read_text())
    assert (found["answers"], found["visual_tokens"]) == (1, generation.statistics.visual_tokens)
    assert 3 < found["processed_tokens"] < found["visual_tokens"]
    assert 0 < found["first_tokens_s"] <= found["total_s"]


def answers_of_lmms_eval(folder: Path, model_args: str) -> list[str]:
    """Run the local task of ``folder`` and return the answers in the order of its questions."""
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "trio_edge", "--model_args", model_args,
        "--tasks", "trio_edge_local", "--include_path", str(folder), "--batch_size", "1",
        "--output_path", str(folder / "out"), "--log_samples",
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "HF_HOME": str(folder / "home")}, timeout=300)
    (samples,) = (folder / "out").rglob("*samples*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
