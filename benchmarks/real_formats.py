"""A real language model in every number format: short answers, perplexity, and next tokens against Hugging Face's float32.

    python benchmarks/real_formats.py --out out/real       # make real; --rows int4: only rows with this word

Bundles are exported once into the output folder, with the default schedule, and run by ONNX Runtime on a CPU. The text is
Python's reference (pydoc's topics), as the model's own answer, token by token through the decode step; "same token" is the
share of places where the bundle's likeliest token is that of Hugging Face in float32. Calibrated scales come from other topics.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any
from unittest import mock

import msgspec
import numpy as np
import torch
from parts.arguments import parser_for, positive
from parts.tables import markdown
from real_weights.checkpoints import checkpoint
from real_weights.texts import CALIBRATING, MEASURED, QUESTIONS, as_chat, as_sequence, is_right, pieces

from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.quantize.calibrating import calibrate_quantization
from trio_edge.calibration.questions import Sample
from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.profiling.statistics import score_interval
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.engines.cpu import CpuAccuracy

_MAKE_PROMPT = "trio_edge.calibration.quantize.collecting.make_prompt"
REQUEST = "Write Python's reference about this: "
ANSWER_TOKENS = 24
SCHEDULE = Schedule(stages=(Stage(layer=4, keep=23), Stage(layer=11, keep=11), Stage(layer=16, keep=6)))


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    plan: str = "none"
    """Value of ``--quantize``."""
    dtype: FloatType = "float16"
    is_calibrated: bool = False
    cpu_accuracy: CpuAccuracy = "float32"
    shape: str = "llava"


VARIANTS = (
    Variant("float32", dtype="float32"),
    Variant("float16"),
    Variant("int8 decoder and head", "int8,head=int8"),
    Variant("int8 decoder and head, --cpu-accuracy int8", "int8,head=int8", cpu_accuracy="int8"),
    Variant("w8a8 decoder and head, SmoothQuant", "int8,head=int8", is_calibrated=True),
    Variant("fp8 decoder and head, calibrated", "fp8,head=fp8", is_calibrated=True),
    Variant("int4 decoder", "int4"),
    Variant("int4 decoder, layers 16 to 29 int8", "int4,suffix=int8"),
    Variant("int4 decoder, AWQ", "int4", is_calibrated=True),
    *(
        Variant(f"int4 decoder, {share} % of columns float16", f"int4,outliers={share}%", is_calibrated=True)
        for share in (1, 3, 10)
    ),
    Variant("smolvlm, float32", dtype="float32", shape="smolvlm"),
)


def bundle_of(variant: Variant, out: Path) -> Path:
    """Return the bundle of a variant; export it if needed."""
    kind = f"{variant.shape}-{variant.dtype}-{variant.plan}-{variant.is_calibrated}"
    path = out / "bundles" / kind.replace(",", "-").replace("=", "-")
    if path.exists():
        return path
    options = ExportOptions(
        model=str(checkpoint(variant.shape, out)),
        out=path,
        schedule=SCHEDULE,
        dtype=variant.dtype,
        max_visual=64 if variant.shape == "smolvlm" else None,
        max_text=64,
        max_new_tokens=400,
        quantize=parse_plan(variant.plan),
    )
    scales = CalibratedScales()
    if variant.is_calibrated:
        model = load_model(options.model)
        scales = calibrated_scales(model, options.quantize, SCHEDULE, dtype=variant.dtype)
    export_bundle(options, scales=scales)
    return path


def calibrated_scales(
    model: TorchModel, plan: QuantizePlan, schedule: Schedule, *, dtype: FloatType
) -> CalibratedScales:
    """Return scales from texts that are not measured."""
    texts = [
        as_chat(model, REQUEST + "Python", ids) for ids in pieces(model, CALIBRATING, count=8, length=192)
    ]
    questions = [Sample(index, str(index), "all", (), (), "", "", ()) for index in range(len(texts))]

    def text_prompt(_model: TorchModel, question: Sample) -> Any:
        return as_sequence(model, texts[question.index], range(4, 10))  # no more than any stage keeps

    with mock.patch(_MAKE_PROMPT, text_prompt):
        found = calibrate_quantization(model, questions, schedule, plan, dtype=dtype, num_tokens=2)
    assert found is not None
    return found.scales


class Forced:
    """A constraint that makes an answer equal to given tokens."""

    def __init__(self, ids: Sequence[int], vocabulary: int) -> None:
        self._ids, self._vocabulary, self._next = ids, vocabulary, 0

    def allowed(self) -> NDArray[np.bool_]:
        allowed = np.zeros(self._vocabulary, bool)
        allowed[self._ids[self._next]] = True
        return allowed

    def add(self, token: int) -> None:
        self._next = min(self._next + 1, len(self._ids) - 1)


class Reading(msgspec.Struct):
    """A model's log probabilities of the texts, and its answers to the questions."""

    log_probs: list[float]
    """Of each token of the texts, natural logarithms."""
    likeliest: list[int]
    """The likeliest token in each place."""
    answers: list[str]

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.log_probs) / len(self.log_probs))


def known(path: Path, make: Callable[[], Reading]) -> Reading:
    """Return the reading that ``path`` holds; make and store it if it is not there, so that a stopped run can go on."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(make()))
    return msgspec.json.decode(path.read_bytes(), type=Reading)


def read_by_bundle(bundle: Path, *, length: int, num_questions: int, cpu_accuracy: CpuAccuracy) -> Reading:
    """Return what a bundle says."""
    result = Reading([], [], [])
    with Pipeline.from_bundle(bundle, backend="onnxruntime", cpu_accuracy=cpu_accuracy) as pipeline:
        vocabulary = pipeline.manifest.token_embedding.shape[0]
        for name in MEASURED:
            ids = pipeline.tokenizer.plain_ids(topics[name])[:length].tolist()
            forced = Forced(ids, vocabulary)
            answer = pipeline.generate(
                None,
                REQUEST + name,
                constraint=forced,
                num_logprobs=1,
                max_new_tokens=len(ids),
                temperature=0,
            )
            assert answer.text is not None
            result.log_probs += [one.chosen for one in answer.logprobs]
            result.likeliest += [one.top_ids[0] for one in answer.logprobs]
        for question, _ in QUESTIONS[:num_questions]:
            answer = pipeline.generate(None, question, max_new_tokens=ANSWER_TOKENS, temperature=0)
            result.answers.append(str(answer.text))
    return result


def read_by_hugging_face(folder: Path, *, length: int, num_questions: int) -> Reading:
    """Return what transformers says in float32."""
    import transformers as hf

    model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    result = Reading([], [], [])

    def prompt_ids(question: str) -> Any:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, return_tensors="pt").input_ids

    for name in MEASURED:
        given = torch.tensor(tokenizer(topics[name]).input_ids[:length])
        prompt = prompt_ids(REQUEST + name)
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, given[None]], 1)).logits[0, prompt.shape[1] - 1 : -1]
        chosen = torch.log_softmax(logits.double(), -1).gather(1, given[:, None])
        result.log_probs += chosen[:, 0].tolist()
        result.likeliest += logits.argmax(-1).tolist()
    for question, _ in QUESTIONS[:num_questions]:
        prompt = prompt_ids(question)
        mask = torch.ones_like(prompt)
        found = model.generate(prompt, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        result.answers.append(tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True))
    return result


def cells(name: str, size: str, one: Reading, exact: Reading) -> tuple[str, ...]:
    """Return a row of the table."""
    same = [float(a == b) for a, b in zip(one.likeliest, exact.likeliest, strict=True)]
    low, high = score_interval(same, [str(place) for place in range(len(same))])
    right = sum(is_right(answer, word) for answer, (_, word) in zip(one.answers, QUESTIONS))
    equal = sum(a.strip() == b.strip() for a, b in zip(one.answers, exact.answers))
    worse = np.mean(exact.log_probs) - np.mean(one.log_probs)
    return (
        name,
        size,
        f"{one.perplexity:.2f}",
        f"{worse:+.4f}",
        f"{100 * np.mean(same):.1f} ({100 * low:.1f}–{100 * high:.1f})",
        str(right),
        str(equal),
    )


def weight_megabytes(bundle: Path) -> float:
    """Return the megabytes of the bundle's weight files, each tensor once."""
    return (
        sum(one.num_bytes for one in open_bundle(bundle).manifest.files if one.path.endswith(".safetensors"))
        / 1e6
    )


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/real"))
    parser.add_argument("--length", type=positive, default=256, help="tokens of each of the texts")
    parser.add_argument("--questions", type=positive, default=len(QUESTIONS))
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="only the rows with one of these words")
    parser.add_argument("--show", action="store_true", help="print the answers, too")
    options = parser.parse_args()
    sizes = {"length": options.length, "num_questions": options.questions}
    place = options.out / f"readings-{options.length}-{options.questions}"
    rows = []
    for variant in VARIANTS:
        if options.rows and not any(word in variant.name for word in options.rows):
            continue
        folder = checkpoint(variant.shape, options.out)
        exact = known(place / f"{variant.shape}.json", partial(read_by_hugging_face, folder, **sizes))
        if not rows:
            rows.append(cells(f"Hugging Face, {variant.shape}", "", exact, exact))
        bundle = bundle_of(variant, options.out)
        read = partial(read_by_bundle, bundle, **sizes, cpu_accuracy=variant.cpu_accuracy)
        one = known(place / f"{variant.name}.json", read)
        rows.append(cells(variant.name, f"{weight_megabytes(bundle):.0f}", one, exact))
        print(rows[-1], flush=True)
        if options.show:
            print(
                "\n".join(
                    f"    {question} {answer!r}" for (question, _), answer in zip(QUESTIONS, one.answers)
                )
            )
    print(
        f"\nSmolLM2-135M-Instruct; {len(one.likeliest)} tokens of Python {platform.python_version()}'s reference,"
        f" {options.questions} questions; ONNX Runtime on a CPU, {platform.machine()}\n"
    )
    heads = (
        "weights",
        "MB",
        "perplexity",
        "nats",
        "same token %",
        f"right of {options.questions}",
        "same answer",
    )
    print(markdown(heads, rows))


if __name__ == "__main__":
    main()
