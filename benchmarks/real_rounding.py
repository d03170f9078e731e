"""A real language model in INT4: perplexity and next tokens by block size, calibration, and parts left in a wider type.

    python benchmarks/real_rounding.py --out out/real            # --layers: the damage of each layer and product alone
    python benchmarks/real_rounding.py --columns                 # INT4 with some columns in floating point

In torch, with the exporter's own rounding of weights and inputs (calibration/quantize), which the tests compare with bundles. Texts
are those of real_formats.py; calibrated scales come from other topics.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from parts.arguments import parser_for, positive
from parts.tables import markdown
from real_formats import REQUEST, calibrated_scales
from real_weights.checkpoints import checkpoint
from real_weights.texts import CALIBRATING, MEASURED, as_chat, as_sequence, pieces

from trio_edge.calibration.model.sequence import advanced, logits_of
from trio_edge.calibration.model.torch_model import TorchModel, load_model
from trio_edge.calibration.quantize.collecting import products_of
from trio_edge.calibration.quantize.quantized_model import quantized_model
from trio_edge.export.graphs.linear_groups import decoder_groups
from trio_edge.export.quantize.numerics import block_size, quantize_weight
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.profiling.statistics import score_interval
from trio_edge.runtime.bundle.schedule import Schedule, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from torch.nn import Parameter

    from trio_edge.export.graphs.linear_groups import LinearGroup

BLOCK_SIZES = (
    "trio_edge.export.quantize.numerics.BLOCK_SIZE",
    "trio_edge.export.quantize.assign.BLOCK_SIZE",
)


COLUMN_SHARES = (0.01, 0.03, 0.1)


class Variant(NamedTuple):
    """One line of the table."""

    name: str
    plan: str
    is_calibrated: bool = False
    block: int = 128
    prefix: int = 4
    """Layers before the first stage, which the plan calls prefix; those after the last one are its suffix."""
    suffix: int = 16
    unrounded: tuple[str, ...] = ()
    """Weights, by a part of their names, whose inputs stay in floating point."""


VARIANTS = (
    Variant("int8", "int8"),
    Variant("int4 (blocks of 96 and 128)", "int4"),
    Variant("int4, blocks of 64", "int4", block=64),
    Variant("int4, blocks of 32", "int4", block=32),
    Variant("int4, AWQ", "int4", is_calibrated=True),
    Variant("w8a8, SmoothQuant", "int8", is_calibrated=True),
    Variant(
        "w8a8, SmoothQuant, down_proj of layers 11, 28 and 29 with float inputs",
        "int8",
        is_calibrated=True,
        unrounded=tuple(f"layers.{layer}.mlp.down_proj" for layer in (11, 28, 29)),
    ),
    Variant(
        "w8a8, SmoothQuant, every down_proj with float inputs",
        "int8",
        is_calibrated=True,
        unrounded=("down_proj",),
    ),
    Variant(
        "w8a8, SmoothQuant, only down_proj with INT8 inputs",
        "int8",
        is_calibrated=True,
        unrounded=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"),
    ),
    Variant("int4, head int8", "int4,head=int8"),
    Variant("int4, head int4", "int4,head=int4"),
    Variant("int4, first 4 layers int8", "int4,prefix=int8"),
    Variant("int4, first 12 layers int8", "int4,prefix=int8", prefix=12, suffix=20),
    Variant("int4, last 14 layers int8", "int4,suffix=int8"),
    Variant("fp8", "fp8"),
    Variant("fp8, calibrated inputs", "fp8", is_calibrated=True),
    Variant("int8, head int8", "int8,head=int8"),
    Variant("int4, blocks of 32, AWQ", "int4", is_calibrated=True, block=32),
    Variant("w8a8, head w8a8, SmoothQuant", "int8,head=int8", is_calibrated=True),
)


class Text(NamedTuple):
    """A model's log probabilities of the texts, and its likeliest tokens."""

    log_probs: Tensor
    """In nats, of each token."""
    likeliest: Tensor


def read(model: TorchModel, length: int) -> Text:
    """Return what the model says, the texts one after another, each of at most ``length`` tokens."""
    log_probs, likeliest = [], []
    with torch.no_grad():
        for name in MEASURED:
            ids = model.tokenizer.plain_ids(topics[name]).tolist()[:length]
            chat = as_chat(model, REQUEST + name, ids)
            rows = advanced(model, as_sequence(model, chat), range(model.num_layers))
            logits_SV = logits_of(model, rows.hidden_SD[-len(ids) - 1 : -1])
            log_probs.append(torch.log_softmax(logits_SV, -1).gather(1, torch.tensor(ids)[:, None])[:, 0])
            likeliest.append(logits_SV.argmax(-1))
    return Text(torch.cat(log_probs), torch.cat(likeliest))


def cells(name: str, one: Text, exact: Text) -> tuple[str, ...]:
    """Return a row of the table."""
    same = (one.likeliest == exact.likeliest).float().tolist()
    low, high = score_interval(same, [str(place) for place in range(len(same))])
    return (
        name,
        f"{float((-one.log_probs.mean()).exp()):.2f}",
        f"{float(exact.log_probs.mean() - one.log_probs.mean()):+.4f}",
        f"{100 * sum(same) / len(same):.1f} ({100 * low:.1f}–{100 * high:.1f})",
    )


def of_variant(model: TorchModel, variant: Variant, length: int) -> Text:
    """Return what the model says in a variant's formats."""
    stages = (Stage(layer=variant.prefix, keep=20), Stage(layer=variant.suffix, keep=10))
    schedule, plan = Schedule(stages=stages), parse_plan(variant.plan)
    with ExitStack() as stack:
        for name in BLOCK_SIZES:
            stack.enter_context(mock.patch(name, variant.block))
        scales = CalibratedScales()
        if variant.is_calibrated:
            scales = calibrated_scales(model, plan, schedule, dtype="float16")
            ranges = {
                name: largest
                for name, largest in scales.activation_max.items()
                if not any(part in name for part in variant.unrounded)
            }
            scales = replace(scales, activation_max=ranges)
        stack.enter_context(quantized_model(model, schedule, plan, scales, dtype="float16"))
        return read(model, length)


def by_product(model: TorchModel, exact: Text, length: int) -> list[tuple[str, ...]]:
    """Return rows for INT4 in one product of all layers, and in one layer alone."""
    groups = groups_of(model)
    kinds = {
        f"int4 only in {name}": [one for one in groups if one.name == name]
        for name in dict.fromkeys(g.name for g in groups)
    }
    kinds |= {
        f"int4 only in layer {index}": [one for one in groups if one.layer == index]
        for index in range(model.num_layers)
    }
    return [
        int4_row(name, model, exact, length, {weight: [] for group in chosen for weight in weights_of(group)})
        for name, chosen in kinds.items()
    ]


def groups_of(model: TorchModel) -> list[LinearGroup]:
    return [
        group
        for index, layer in enumerate(model.parts.layers)
        for group in decoder_groups(layer, index=index)
    ]


def weights_of(group: LinearGroup) -> list[Parameter]:
    return [linear.get_parameter("weight") for linear in group.linears]


def spread_of(group: LinearGroup) -> Tensor:
    """Return what the layer before a group says about the size of its inputs."""
    if group.before is None:
        return torch.ones(group.num_inputs)
    weight = group.before.get_parameter("weight").data[group.start :]
    if weight.dim() == 1:
        return weight.abs()
    # Several query heads read one head of v.
    heads = weight.norm(dim=1).reshape(-1, 64) if group.name == "o" else weight.norm(dim=1)[None]
    return heads.repeat_interleave(group.num_inputs // heads.numel(), dim=0).flatten()


def int4_row(
    name: str, model: TorchModel, exact: Text, length: int, weights: Mapping[Parameter, Any]
) -> tuple[str, ...]:
    """Return the row of INT4 in some weights, of which given columns keep their values and are left out of the blocks."""
    before = {weight: weight.data for weight in weights}
    for weight, columns in weights.items():
        rest = weight.data.clone()
        rest[:, columns] = 0
        rounded = quantize_weight(rest, kind="int4", dtype="float16", block=block_size(weight.shape[1]))
        values = rounded.dequantized().to(weight.dtype)
        values[:, columns] = weight.data[:, columns]
        weight.data = values
    found = cells(name, read(model, length), exact)
    print(found, flush=True)
    for weight, values in before.items():
        weight.data = values
    return found


def by_columns(model: TorchModel, exact: Text, length: int) -> list[tuple[str, ...]]:
    """Return rows for INT4 with shares of the columns, by three rules, in floating point."""
    groups = groups_of(model)
    inputs: dict[Parameter, list[Tensor]] = {weights_of(group)[0]: [] for group in groups}

    def listener(found: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def listen(values: Tensor) -> Tensor:
            found.append(values.flatten(0, -2))
            return values

        return listen

    with torch.no_grad(), ExitStack() as stack:
        for layer in model.parts.layers:
            stack.enter_context(products_of(layer, {w: listener(found) for w, found in inputs.items()}))
        for ids in pieces(model, CALIBRATING, count=8, length=192):
            chat = as_chat(model, REQUEST + "Python", ids)
            advanced(model, as_sequence(model, chat), range(model.num_layers))
    torch.manual_seed(0)
    by_rule: dict[str, dict[Parameter, Tensor]] = {
        rule: {}
        for rule in (
            "largest input",
            "mean square of the input times the weights'",
            "weights alone",
            "weights and the layer before",
            "random",
        )
    }
    for group in groups:
        first, *_ = weights = weights_of(group)
        rows_SI = torch.cat(inputs[first])
        norm_I = sum(weight.data.square().sum(0) for weight in weights)
        scores = (
            rows_SI.abs().amax(0),
            rows_SI.square().mean(0) * norm_I,
            norm_I,
            norm_I * spread_of(group) ** 2,
            torch.rand(group.num_inputs),
        )
        for chosen, score_I in zip(by_rule.values(), scores):
            chosen.update(dict.fromkeys(weights, score_I.argsort(descending=True)))
    found = [int4_row("int4", model, exact, length, {w: [] for w in by_rule["random"]})]
    for rule, ranked in by_rule.items():
        for share in COLUMN_SHARES:
            columns = {weight: order[: round(share * len(order))] for weight, order in ranked.items()}
            found.append(int4_row(f"{rule}, {100 * share:.0f} %", model, exact, length, columns))
    return found


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/real"))
    parser.add_argument("--length", type=positive, default=256, help="most tokens of each of the texts")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--columns", action="store_true")
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="only the rows with one of these words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(str(checkpoint("llava", options.out)))
    exact = read(model, options.length)
    rows = [cells("float32", exact, exact)]
    if options.layers:
        rows += by_product(model, exact, options.length)
    if options.columns:
        rows += by_columns(model, exact, options.length)
    for variant in () if options.layers or options.columns else VARIANTS:
        if options.rows is None or any(word in variant.name for word in options.rows):
            rows.append(cells(variant.name, of_variant(model, variant, options.length), exact))
            print(rows[-1], flush=True)
    print(f"\nSmolLM2-135M-Instruct, {len(exact.log_probs)} tokens, in torch\n")
    print(markdown(("weights", "perplexity", "nats", "same token %"), rows))


if __name__ == "__main__":
    main()
