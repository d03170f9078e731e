"""Runs the tables of ``trio-reproduce`` through lmms-eval on made questions and random checkpoints with small widths.

Layers, image shapes and schedules are the released ones; widths, weights and questions are made, so scores and times mean
nothing. It shows that every export, prompt, task and column of the tables works. Needs lmms-eval.

    python benchmarks/reproduce_small.py out/reproduce --limit 2
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers as hf
from parts.released_shapes import (
    FAMILIES,
    PINPOINTS,
    clip_large,
    llava_next,
    make_checkpoint,
    qwen2_5_vl,
    vicuna_7b,
)
from PIL import Image

from trio_edge.calibration.reproduce.cli import TABLES, main

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 32}
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
QWEN_TEXT = {
    **TEXT, "num_hidden_layers": 28, "num_key_value_heads": 2, "max_window_layers": 28,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}  # fmt: skip
CONFIGS = {
    "llava-1.5-7b": lambda: hf.LlavaConfig(
        text_config=vicuna_7b(**TEXT), vision_config=clip_large(**VISION), image_token_index=32000
    ),
    "llava-next-7b": lambda: llava_next(vicuna_7b(**TEXT), clip_large(**VISION), PINPOINTS),
    "qwen2.5-vl-7b": lambda: qwen2_5_vl(text=QWEN_TEXT, vision=QWEN_VISION, tie=False),
}
FIRST = "dataset_path: json\ndataset_kwargs: {data_files: {test: DATA}}\ntest_split: test\noutput_type: generate_until\n"
FIRST += "doc_to_visual: !function functions.doc_to_visual\ndoc_to_target: answer\n"
FIRST += "generation_kwargs: {max_new_tokens: 4, temperature: 0, do_sample: false}\n"
POPE = "lmms_eval.tasks.pope.utils.pope_"
RECT = "lmms_eval.tasks.refcoco.utils_rec.refcoco_bbox_rec_"
TEXTVQA = "lmms_eval.tasks.textvqa.utils.textvqa_"
TASKS = {
    "made_exact": "doc_to_text: question\nmetric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    "made_pope": f"doc_to_text: !function {POPE}doc_to_text\nprocess_results: !function {POPE}process_results\n"
    f"metric_list: [{{metric: pope_accuracy, aggregation: !function {POPE}aggregate_accuracy, higher_is_better: true}}]\n"
    "lmms_eval_specific_kwargs: {default: {post_prompt: ' Answer the question using a single word or phrase.'}}\n",
    "made_ocr": f"doc_to_text: !function {TEXTVQA}doc_to_text\nprocess_results: !function {TEXTVQA}process_results\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    "lmms_eval_specific_kwargs: {default: {pre_prompt: '', post_prompt: ' Answer.', ocr: true}}\n",
    "made_boxes": f"doc_to_text: !function {RECT}doc_to_text\nprocess_results: !function {RECT}process_result\n"
    f"metric_list: [{{metric: refcoco_ACC@0.5, aggregation: !function {RECT}acc05, higher_is_better: true}}]\n",
}
"""Tasks on the made questions, with the harness's own prompts and scores for POPE, TextVQA and RefCOCO."""
BY_BENCHMARK = {"POPE": "made_pope", "TextVQA": "made_ocr", "RefCOCO": "made_boxes"}
FUNCTIONS = """
from pathlib import Path
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(Path(__file__).parent / doc["image"])]
"""


def write_tasks(folder: Path, count: int = 6) -> None:
    """Write images, questions and tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, lines = np.random.default_rng(0), []
    for number, size in enumerate(
        [(640, 480), (480, 640), (500, 375), (336, 336), (1008, 336), (1008, 1008)][:count]
    ):
        pixels = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / f"{number}.png")
        answers = {"answer": "yes", "answers": ["yes"] * 10, "bbox": [0.1, 0.1, 0.5, 0.5]}
        question = {
            "question": "is there a dog in the image ?",
            "ocr_tokens": ["stop", "42"],
            "question_id": number,
        }
        lines.append({"image": f"{number}.png", **question, **answers})
    data = folder / "made.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "functions.py").write_text(FUNCTIONS)
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{FIRST.replace('DATA', str(data))}{rest}")


def write_tables(file: Path) -> dict[str, Any]:
    """Write the published tables with made tasks in place of the benchmarks', and return them."""
    tables: dict[str, Any] = json.loads(TABLES.read_bytes())
    for name, benchmark in tables["benchmarks"].items():
        benchmark["task"] = BY_BENCHMARK.get(name, "made_exact")
        if name not in BY_BENCHMARK:
            benchmark["metrics"] = ["exact_match"]
    file.write_text(json.dumps(tables))
    return tables


def checkpoint(folder: Path, model: str) -> Path:
    if not folder.exists():
        family = replace(FAMILIES[model], config=CONFIGS[model])
        make_checkpoint(folder, family=family, num_layers=None, dtype="float32", shard_bytes=1 << 30)
    return folder


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", action="append", help="only this table; may be repeated")
    parser.add_argument("--benchmark", action="append", help="only this benchmark, where a table has it")
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--limit", type=int, default=2)
    options = parser.parse_args()
    folder = options.folder.resolve()
    write_tasks(folder)
    tables, code = write_tables(folder / "tables.json"), 0
    for name, table in tables["tables"].items():
        if options.table and name not in options.table:
            continue
        chosen = [one for one in options.benchmark or [] if one in table["benchmarks"]]
        arguments = [name, "--tables", str(folder / "tables.json"), "--work", str(folder / name)]
        arguments += ["--model", str(checkpoint(folder / table["model"], table["model"]))]
        arguments += ["--limit", str(options.limit), "--json", str(folder / f"{name}.json"), "--threads", "1"]
        arguments += [word for one in chosen for word in ("--benchmark", one)]
        arguments += [word for row in options.row for word in ("--row", row)]
        code = main(arguments) or code
    return code


if __name__ == "__main__":
    raise SystemExit(run())
