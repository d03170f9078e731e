"""FLOPs and time of one selection stage, by the paper's code and by ours.

    python benchmarks/select_cost.py --sizes 576 --hidden 1024 --repeats 3

The reference runs autograd over all rows of one decoder layer and the whole head, then a greedy loop on the host. Ours is the
closed form and the parallel NMS of ``trio_edge.trio``, in eager torch. Weights and hidden states are random; only the time of the
host's loop depends on their values.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers as hf
from gpu_parts.ceilings import median_ms
from parts.arguments import parser_for
from parts.reference_stage import autograd_scores, host_nms
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from trio_edge.profiling.predict.models import MODELS
from trio_edge.runtime.bundle.manifest import Dimensions
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.budgets import ScheduleRequest
from trio_edge.trio.cost.flops import count_prefill
from trio_edge.trio.cost.selections import StageSizes, trio_work
from trio_edge.trio.cost.work import head_work, layer_weights, range_work, vision_work
from trio_edge.trio.nms import FeatureNms
from trio_edge.trio.saliency import ProxySaliency

NUM_TEXT, START, THRESHOLD, ROUNDS, HEAD_SIZE, VOCAB = 50, 35, 0.8, 16, 128, 32064


def decoder_shape(hidden: int, *, grouped: bool) -> Dimensions:
    heads = hidden // HEAD_SIZE
    return Dimensions(
        num_layers=32, hidden_size=hidden, num_heads=heads, num_kv_heads=heads // 4 if grouped else heads,
        head_size=HEAD_SIZE, intermediate_size=hidden * 11008 // 4096, vocab_size=VOCAB,
    )  # fmt: skip


class Stage:
    """A random layer with its norm and head, and an image of clustered features."""

    def __init__(self, shape: Dimensions, *, num_visual: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, vocab_size=VOCAB,
            num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, num_hidden_layers=1,
            attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device(device):
            self.layer: Any = LlamaDecoderLayer(config, 0).to(dtype)
            self.norm = LlamaRMSNorm(shape.hidden_size).to(dtype)
            self.lm_head = nn.Linear(shape.hidden_size, VOCAB, bias=False, dtype=dtype)
            centres = torch.randn(num_visual // 5, shape.hidden_size)
            rows = torch.randn(num_visual + NUM_TEXT, shape.hidden_size)
            rows[START : START + num_visual] *= 0.4
            rows[START : START + num_visual] += centres[torch.randint(len(centres), (num_visual,))]
            self.hidden = rows.to(dtype)
            cos, sin = LlamaRotaryEmbedding(config)(self.hidden, torch.arange(len(rows))[None])
        for module in (self.layer, self.norm, self.lm_head):
            module.requires_grad_(False)
        self.cos, self.sin = cos[0], sin[0]
        self.num_visual, self.num_keep = num_visual, round(num_visual * 0.16)
        self.visual_rows = torch.arange(START, START + num_visual, device=device)
        self.scalars = [torch.tensor([n], device=device) for n in (num_visual, num_visual + NUM_TEXT)]
        self.saliency = ProxySaliency(self.layer, self.norm, self.lm_head, max_visual=num_visual)
        self.nms = FeatureNms(num_keep=self.num_keep, threshold=THRESHOLD, rounds=ROUNDS)

    def reference_scores(self) -> Tensor:
        """Return the scores by autograd over the layer and the head on all rows, as in the paper's code."""
        tables = (self.cos[None], self.sin[None])

        def logits(rows: Tensor) -> Tensor:
            return self.lm_head(self.norm(self.layer(rows[None], position_embeddings=tables)))[0]

        return autograd_scores(logits, self.hidden)[START : START + self.num_visual]

    def reference_nms(self, scores: Tensor) -> list[int]:
        """Return the kept tokens, decided one by one on the host."""
        features = self.hidden[START : START + self.num_visual]
        return host_nms(features, scores, num_keep=self.num_keep, threshold=THRESHOLD)

    def scores(self) -> Tensor:
        return self.saliency(self.hidden, self.cos, self.sin, self.visual_rows, *self.scalars)

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return self.nms(self.hidden[START : START + self.num_visual], scores, self.scalars[0])


def reference_probe_flops(shape: Dimensions, *, num_rows: int) -> float:
    """Return the FLOPs of the layer and the whole head over all rows, forwards and backwards, with frozen weights."""
    (attention,) = range_work(shape, layers=(0,), rows=num_rows).attention
    head = 2 * num_rows * head_work(shape).flops
    return 4.0 * num_rows * layer_weights(shape) + 3.0 * attention.flops + head


def measure(shape: Dimensions, *, num_visual: int, repeats: int, device: str, dtype: torch.dtype) -> str:
    stage = Stage(shape, num_visual=num_visual, device=device, dtype=dtype)
    rows = num_visual + NUM_TEXT
    scores = stage.scores()
    kept, unsettled = stage.select(scores)
    same = kept.tolist() == stage.reference_nms(scores)
    reference = stage.reference_scores()
    error = float(((scores - reference).abs() / reference).max())
    ref_probe = median_ms(stage.reference_scores, device=torch.device(device), runs=repeats)
    ref_nms = median_ms(lambda: stage.reference_nms(scores), device=torch.device(device), runs=repeats)
    probe = median_ms(stage.scores, device=torch.device(device), runs=repeats)
    nms = median_ms(lambda: stage.select(scores), device=torch.device(device), runs=repeats)
    ref_flops = reference_probe_flops(shape, num_rows=rows)
    sizes = StageSizes(num_visual, stage.num_keep, NUM_TEXT, num_visual)
    schedule = Schedule(nms_rounds=ROUNDS)
    flops = trio_work(shape, schedule, sizes, pieces=("probe", "gradient", "saliency")).flops
    # The greedy host loop compares at most K kept tokens with all.
    ref_nms_flops = 2.0 * stage.num_keep * num_visual * shape.hidden_size
    own_nms_flops = trio_work(shape, schedule, sizes, pieces=("select",)).flops
    kind = "gqa" if shape.num_kv_heads < shape.num_heads else "mha"
    return (
        f"{kind} {shape.hidden_size:>5} {num_visual:>5} {stage.saliency.form:>14} |"
        f" {ref_flops / 1e9:>8.1f} {flops / 1e9:>7.1f} {ref_flops / flops:>6.1f}x |"
        f" {ref_probe:>9.1f} {probe:>8.1f} {ref_probe / probe:>6.1f}x |"
        f" {ref_nms_flops / 1e9:>6.1f} {own_nms_flops / 1e9:>6.1f} {ref_nms:>8.1f} {nms:>8.1f} {ref_nms / nms:>6.1f}x |"
        f" {(ref_probe + ref_nms) / (probe + nms):>6.1f}x | {error:.0e} {'same' if same else 'DIFFERENT'} {int(unsettled)}"
    )


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[576, 1152, 2880], help="visual tokens N")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 4096], help="hidden sizes D")
    parser.add_argument("--attention", nargs="+", choices=["mha", "gqa"], default=["mha", "gqa"])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the median is printed")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: the CPU, and CUDA if available",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices if options.device == "auto" else [options.device]:
        dtype = torch.float16 if device == "cuda" else torch.float32
        name = (
            torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        )
        print(
            f"\n{device} ({name}), {str(dtype).removeprefix('torch.')}, {options.threads} CPU threads, torch"
            f" {torch.__version__}, transformers {hf.__version__}, median of {options.repeats}, one stage,"
            f" {NUM_TEXT} text tokens, K = 0.16 N, {ROUNDS} NMS rounds"
        )
        print(
            "      D     N           form |  probe GFLOPs: ref, ours |       probe ms: ref, ours  |"
            "   NMS GFLOPs: ref, ours; ms: ref, ours   |  total | score error, kept, unsettled"
        )
        for attention in options.attention:
            for hidden in options.hidden:
                for size in options.sizes:
                    shape = decoder_shape(hidden, grouped=attention == "gqa")
                    line = measure(
                        shape, num_visual=size, repeats=options.repeats, device=device, dtype=dtype
                    )
                    print(line, flush=True)
    print(f"\n{_prefill_share()}")


def _prefill_share() -> str:
    model = MODELS["llava-next-7b"]
    assert model.vision is not None
    schedule = ScheduleRequest().schedule(num_layers=model.decoder.num_layers, num_visual=2880)
    cost = count_prefill(model.decoder, schedule, num_visual=2880, num_text=NUM_TEXT)
    reduced = cost.flops + vision_work(model.vision, {"B": 5, "N": 2880}).flops
    decoder = cost.flops
    return (
        f"LLaVA-NeXT-7B, 11.1%, N = 2880, by count: three stages take {cost.select_flops / 1e12:.3f} TFLOPs,"
        f" {cost.select_flops / reduced:.1%} of the pruned prefill ({reduced / 1e12:.2f} TFLOPs with the vision"
        f" tower), {cost.select_flops / decoder:.1%} of its decoder part ({decoder / 1e12:.2f} TFLOPs)"
    )


if __name__ == "__main__":
    main()
