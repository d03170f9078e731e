"""Processor time of a token by ``--quantize``, bundles in turn, on one thread of ONNX Runtime.

    python benchmarks/quantized_times.py --out out/real            # SmolLM2-135M-Instruct (make real)
    python benchmarks/quantized_times.py --wide /tmp/wide          # random weights: eight layers, 2048 wide

Bundles are exported once, in float32 as a CPU computes. Outlier columns are drawn at random, which does not change the time.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from parts.arguments import parser_for, positive
from parts.tables import markdown
from real_formats import SCHEDULE
from real_formats import weight_megabytes as megabytes
from real_weights.checkpoints import VOCABULARY, checkpoint, llava

from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.quantize.sections import quantized_sections
from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.export.quantize.numerics import outlier_columns
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.export.quantize.plan import QuantizePlan

PLANS = (
    "int4,head=int8",
    "int4,suffix=int8,head=int8",
    "int4,outliers=3%,head=int8",
    "int4,outliers=10%,head=int8",
)
WIDE_SCHEDULE = Schedule(stages=(Stage(layer=2, keep=23), Stage(layer=3, keep=11), Stage(layer=4, keep=6)))


def wide_checkpoint(folder: Path, real: Path) -> Path:
    """Return a checkpoint with random weights and the real one's tokenizer; write it if it is not there."""
    if not folder.exists():
        import transformers as hf

        sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": VOCABULARY}
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        text = hf.LlamaConfig(**sizes, **heads, pad_token_id=2, tie_word_embeddings=True)
        llava(text, folder).to(torch.float16).save_pretrained(folder)
        for file in real.iterdir():
            if file.name not in ("config.json", "model.safetensors", "generation_config.json"):
                shutil.copy(file, folder)
        # Random weights stop at no token that they would say.
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": VOCABULARY - 1}))
    return folder


def columns_of(model: Path, plan: QuantizePlan, schedule: Schedule) -> dict[str, Tensor]:
    """Return columns for each weight; those of one group are the same."""
    if not plan.outliers:
        return {}
    loaded, generator = load_model(str(model)), torch.Generator().manual_seed(0)
    names, found = loaded.tensor_names(), {}
    for section in quantized_sections(loaded, schedule, plan):
        for group in section.groups if section.kind == "int4" else ():
            rows_TI = torch.rand(1, group.num_inputs, generator=generator)
            columns_K = outlier_columns(rows_TI, torch.ones_like(rows_TI), share=plan.outliers)
            found |= {names[linear.get_parameter("weight")]: columns_K for linear in group.linears}
    return found


def seconds(pipeline: Pipeline, num_tokens: int) -> float:
    start = time.process_time()
    answer = pipeline.generate(None, "Tell me about the sea.", max_new_tokens=num_tokens, temperature=0)
    assert answer.text is not None
    assert len(answer.token_ids) == num_tokens
    return time.process_time() - start


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/real"))
    parser.add_argument("--wide", type=Path, help="folder of the wide checkpoint")
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--rounds", type=positive, default=12)
    parser.add_argument("--new-tokens", type=positive, default=24)
    options = parser.parse_args()
    model, schedule = checkpoint("llava", options.out), SCHEDULE
    if options.wide is not None:
        model, schedule = wide_checkpoint(options.wide / "checkpoint", model), WIDE_SCHEDULE
    bundles = {}
    for text in options.plans:
        name = text.replace(",", "-").replace("=", "-")
        bundles[text] = path = (options.wide or options.out) / "bundles" / f"times-{name}"
        if not path.exists():
            plan = parse_plan(text)
            columns = columns_of(model, plan, schedule)
            wanted = ExportOptions(
                model=str(model),
                out=path,
                schedule=schedule,
                dtype="float32",
                max_text=64,
                max_new_tokens=64,
                quantize=plan,
            )
            export_bundle(wanted, scales=CalibratedScales(outliers=columns, num_samples=len(columns)))
    pipelines = {
        text: Pipeline.from_bundle(path, backend="onnxruntime", threads=1) for text, path in bundles.items()
    }
    first: dict[str, list[float]] = {text: [] for text in bundles}
    later: dict[str, list[float]] = {text: [] for text in bundles}
    for turn in range(options.rounds + 1):
        for text, pipeline in pipelines.items():
            one, all_of_them = seconds(pipeline, 1), seconds(pipeline, 1 + options.new_tokens)
            if turn:  # the first one warms up
                first[text].append(1e3 * one)
                later[text].append(1e3 * (all_of_them - one) / options.new_tokens)
    rows = []
    for text, path in bundles.items():
        low, median, high = np.percentile(later[text], (25, 50, 75))
        times = (f"{median:.1f} ({low:.1f}–{high:.1f})", f"{np.median(first[text]):.0f}")
        rows.append((f"`{text}`", f"{megabytes(path):.0f}", *times))
    print(markdown(("`--quantize`", "MB", "ms a token (quartiles)", "first token, ms"), rows))


if __name__ == "__main__":
    main()
