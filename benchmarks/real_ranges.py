"""Outliers of a real language model by layer: activations, gradients, attention to the first row, and similar rows.

    python benchmarks/real_ranges.py --model real        # or --model tiny, the packaged model

In torch, float32. The real model reads pieces of Python's reference whose middle is marked as visual; the packaged model reads
drawn questions. Gradients are the whole model's, of TRIO's loss. "In float16" repeats the model and TRIO's probes with weights and
activations in float16, as TensorRT computes them, and compares the tokens that a stage keeps.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from parts.arguments import parser_for, positive
from parts.drawn_questions import drawn_questions
from parts.tables import markdown
from real_weights.checkpoints import checkpoint
from real_weights.texts import MEASURED, as_sequence, pieces

from trio_edge.calibration.model.gradients import whole_gradients
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.ranges import listening_to_ranges
from trio_edge.calibration.model.sequence import advanced, logits_of, order_of, saliency
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.questions import read_questions
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.nms import similar_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel

_COMPUTE_TYPE = "trio_edge.calibration.model.torch_model._compute_type"
SMALLEST = 2.0**-24
"""The smallest float16 above 0."""


def loaded(name: str, count: int) -> tuple[TorchModel, Callable[[TorchModel], list[Sequence]]]:
    """Return a model, and a function that makes its samples."""
    if name == "tiny":
        questions = read_questions(drawn_questions(count, seed=7))
        return load_model("tiny"), lambda model: [make_prompt(model, question) for question in questions]

    def of_texts(model: TorchModel) -> list[Sequence]:
        # three rows before and twenty after, like a chat's
        return [as_sequence(model, [1, *ids], range(4, 172)) for ids in texts]

    model = load_model(str(checkpoint("llava", Path("out/real"))))
    texts = pieces(model, (*MEASURED, "import"), count=count, length=191)
    return model, of_texts


def layer_inputs(model: TorchModel, sequence: Sequence) -> list[Sequence]:
    """Return the sequence before each layer, and after the last."""
    found = [sequence]
    for layer in range(model.num_layers):
        found.append(advanced(model, found[-1], range(layer, layer + 1)))
    return found


def attention_to_first(model: TorchModel, layer: int, sequence: Sequence, schedule: Schedule) -> Tensor:
    """Return the mean attention of the probe rows to the first row."""
    probe, length = model.probe(layer, schedule), len(sequence.hidden_SD)
    cos, sin = model.rotary(sequence.positions_AS)
    rows_R = torch.arange(length - 5, length - 1)
    first = torch.zeros(1, dtype=torch.int64)
    state = probe.attend(sequence.hidden_SD, cos[0], sin[0], first, rows_R, torch.tensor([length]))
    return state.attention_HRN.mean()


def figures(model: TorchModel, sequence: Sequence, schedule: Schedule) -> list[dict[str, float]]:
    """Return the figures of one sample before each layer."""
    gradients = whole_gradients(model, sequence, schedule)
    found = []
    with torch.no_grad():
        for layer, entering in enumerate(layer_inputs(model, sequence)[:-1]):
            rows_SD = entering.hidden_SD
            visual_ND = rows_SD[entering.visual_rows_N]
            scores_N = saliency(model, layer, schedule, entering)
            real_N = torch.ones(len(visual_ND), dtype=torch.bool)
            similar_NN = similar_tokens(visual_ND, real_N, threshold=0.8)
            similar_NN.fill_diagonal_(False)
            largest_S = rows_SD.abs().amax(-1)
            found.append(
                {
                    "largest": float(largest_S.max()),
                    "row": float(largest_S.argmax()),
                    "largest of visual rows": float(visual_ND.abs().max()),
                    "median length": float(visual_ND.norm(dim=-1).median()),
                    "attention to row 0": float(attention_to_first(model, layer, entering, schedule)),
                    "similar": float(similar_NN.float().mean()),
                    "suppressed": 1 - len(_survivors(similar_NN, scores_N)) / len(scores_N),
                    "saliency min": float(scores_N.min()),
                    "saliency max": float(scores_N.max()),
                    "gradient min": float(gradients[layer].min()),
                    "gradient max": float(gradients[layer].max()),
                }
            )
    return found


def _survivors(similar_NN: Tensor, scores_N: Tensor) -> list[int]:
    """Return the tokens that greedy suppression leaves."""
    left: list[int] = []
    for token in scores_N.argsort(descending=True).tolist():
        if not left or not similar_NN[token, left].any():
            left.append(token)
    return left


def in_float16(
    name: str, exact_model: TorchModel, make: Callable[[TorchModel], list[Sequence]], schedule: Schedule
) -> dict[str, Any]:
    """Return how a model in float16 differs from float32 on the same samples."""
    with mock.patch(_COMPUTE_TYPE, lambda _checkpoint: torch.float16):
        folder = "tiny" if name == "tiny" else str(checkpoint("llava", Path("out/real")))
        model = load_model(folder)
    same, errors, kept, finite = [], [], [[] for _ in range(model.num_layers)], True
    with torch.no_grad():
        for one, half in zip(make(exact_model), make(model)):
            ours, theirs = layer_inputs(exact_model, one), layer_inputs(model, half)
            exact_SV, half_SV = (
                logits_of(which, last.hidden_SD)
                for which, last in ((exact_model, ours[-1]), (model, theirs[-1]))
            )
            finite &= bool(torch.isfinite(half_SV).all())
            same.append(float((exact_SV.argmax(-1) == half_SV.argmax(-1)).float().mean()))
            errors.append(
                float((torch.log_softmax(exact_SV, -1) - torch.log_softmax(half_SV, -1)).abs().mean())
            )
            for layer in range(model.num_layers):
                sets = [
                    set(
                        order_of(entering, saliency(which, layer, schedule, entering), threshold=0.8)
                        .kept(len(entering.original_N) // 9)
                        .tolist()
                    )
                    for which, entering in ((exact_model, ours[layer]), (model, theirs[layer]))
                ]
                kept[layer].append(len(sets[0] & sets[1]) / len(sets[0]))
    return {
        "finite": finite,
        "same token": np.mean(same),
        "nats": np.mean(errors),
        "kept too": [np.mean(one) for one in kept],
    }


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--model", choices=["real", "tiny"], default="real")
    parser.add_argument("--count", type=positive, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    schedule = Schedule()
    model, make = loaded(options.model, options.count)
    with torch.no_grad():
        samples = make(model)
        with listening_to_ranges(model) as largest:
            for sample in samples:
                logits_of(model, layer_inputs(model, sample)[-1].hidden_SD)
    by_sample = [figures(model, sample, schedule) for sample in samples]
    half = in_float16(options.model, model, make, schedule)
    rows = []
    for layer in range(model.num_layers):
        of = {name: np.array([one[layer][name] for one in by_sample]) for name in by_sample[0][layer]}
        inner = {
            name.removeprefix(f"layers.{layer}."): value
            for name, value in largest.items()
            if name.startswith(f"layers.{layer}.")
        }
        rows.append(
            (
                str(layer),
                f"{of['largest'].max():.0f} (row {', '.join(sorted({f'{row:.0f}' for row in of['row']}))})",
                f"{of['largest of visual rows'].max():.1f}",
                f"{inner['mlp.down_proj']:.0f}",
                f"{max(inner['self_attn.q_proj'], inner['self_attn.k_proj']):.0f}",
                f"{100 * of['attention to row 0'].mean():.0f}",
                f"{100 * of['similar'].mean():.1f}",
                f"{100 * of['suppressed'].mean():.0f}",
                f"{of['saliency min'].min():.1e} – {of['saliency max'].max():.1e}",
                f"{of['gradient min'].min():.1e} – {of['gradient max'].max():.1e}",
                f"{100 * half['kept too'][layer]:.1f}",
            )
        )
    heads = (
        "layer", "largest input", "of visual rows", "largest of mlp", "q, k", "attention to row 0, %", "similar pairs, %",
        "suppressed, %", "saliency", "whole gradient", "kept too in float16, %",
    )  # fmt: skip
    print(f"{options.model}, {options.count} samples of {samples[0].num_visual} visual rows\n")
    print(markdown(heads, rows))
    print(
        f"\nin float16: all logits finite: {half['finite']}; same likeliest token {100 * half['same token']:.2f} %;"
        f" |Δ log p| {half['nats']:.1e} nats; largest value in the head {largest['head']:.0f};"
        f" gradients below {SMALLEST:.0e} vanish in float16 without a loss scale"
    )


if __name__ == "__main__":
    main()
