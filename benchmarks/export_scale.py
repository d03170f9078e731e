"""What an export costs at full size: makes a checkpoint with a released model's shapes, exports it, runs its graphs.

    python benchmarks/export_scale.py --family llava-next-7b --folder /tmp/scale

Weights are random and mean nothing; names, shapes, shards, index and the other files are those of the released
checkpoint. They are written piece by piece, so 14 GB need no memory. Then, each in a process of its own: a plain copy of
the weight files (what the export is compared with), ``trio-export`` itself, and single graphs of the bundle in ONNX
Runtime. Before each of them the checkpoint leaves the page cache. Free space for three copies is needed for a moment;
all is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from trio_edge.runtime.bundle import Bundle, open_bundle
from trio_edge.runtime.chat import MISTRAL_TEMPLATE, VICUNA_TEMPLATE
from trio_edge.runtime.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
PIECE = (
    4 << 20
) + 3  # random values that are repeated: writing is then bound by the disk, not by the generator
SAMPLE_SECONDS = 0.02
STEPS = ("reading", "tracing", "writing", "hashing")  # what trio-export prints when it is not on a terminal
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


# ---------------------------------------------------------------------------------------------- the checkpoint


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a released checkpoint consists of, besides its weights."""

    config: Callable[[], Any]
    model: str
    """Class in transformers."""
    renames: tuple[tuple[str, str], ...]
    """From a name in transformers' model to the name in released files."""
    preprocessor: dict[str, Any]
    chat_template: str
    special_tokens: dict[int, str]


def clip_large(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    return hf.CLIPVisionConfig(**{**sizes, **changes})


def vicuna_7b(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return hf.LlamaConfig(**{**sizes, **changes})


def mistral_7b() -> Any:
    return hf.MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32064, max_position_embeddings=32768, rms_norm_eps=1e-5,
        sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def llava_next(text: Any, vision: Any, pinpoints: list[list[int]]) -> Any:
    return hf.LlavaNextConfig(
        text_config=text, vision_config=vision, image_grid_pinpoints=pinpoints, image_token_index=32000
    )


def tiny() -> Any:
    text = vicuna_7b(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = clip_large(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, projection_dim=32
    )
    return llava_next(text, vision, PINPOINTS)


def qwen2_5_vl(*, text: dict[str, Any], vision: dict[str, Any], tie: bool) -> Any:
    """Return Qwen2.5-VL's configuration with the sizes of one release; those of 3B are given where none are."""
    text_sizes = {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "max_window_layers": 70, "use_sliding_window": False, "sliding_window": 32768, "tie_word_embeddings": tie,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    vision_sizes = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "in_channels": 3,
    }  # fmt: skip
    return hf.Qwen2_5_VLConfig(
        text_config={**text_sizes, **text}, vision_config={**vision_sizes, **vision}, tie_word_embeddings=tie,
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
    )  # fmt: skip


def qwen2_5_vl_3b() -> Any:
    return qwen2_5_vl(text={}, vision={}, tie=True)


def qwen2_5_vl_7b() -> Any:
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_window_layers": 28,
    }  # fmt: skip
    return qwen2_5_vl(text=text, vision={"out_hidden_size": 3584}, tie=False)


LLAVA_RENAMES = (
    (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)
QWEN_RENAMES = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
CLIP_PREPROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 336}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_convert_rgb": True,
}  # fmt: skip
ANYRES_PREPROCESSOR = {
    **CLIP_PREPROCESSOR, "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor",
    "image_grid_pinpoints": PINPOINTS,
}  # fmt: skip
QWEN_PREPROCESSOR = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TOKENS = {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"}
QWEN_TOKENS = {
    151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151652: "<|vision_start|>",
    151653: "<|vision_end|>", 151654: "<|vision_pad|>", 151655: "<|image_pad|>", 151656: "<|video_pad|>",
}  # fmt: skip


def _llava_next_family(config: Callable[[], Any], template: str = VICUNA_TEMPLATE) -> Family:
    return Family(
        config=config, model="LlavaNextForConditionalGeneration", renames=LLAVA_RENAMES,
        preprocessor=ANYRES_PREPROCESSOR, chat_template=template, special_tokens=LLAMA_TOKENS,
    )  # fmt: skip


def _qwen_family(config: Callable[[], Any]) -> Family:
    return Family(
        config=config, model="Qwen2_5_VLForConditionalGeneration", renames=QWEN_RENAMES,
        preprocessor=QWEN_PREPROCESSOR, chat_template=QWEN_TEMPLATE, special_tokens=QWEN_TOKENS,
    )  # fmt: skip


FAMILIES = {
    "llava-next-7b": _llava_next_family(lambda: llava_next(vicuna_7b(), clip_large(), PINPOINTS)),
    "llava-next-mistral-7b": _llava_next_family(
        lambda: llava_next(mistral_7b(), clip_large(), PINPOINTS), MISTRAL_TEMPLATE
    ),
    "llava-1.5-7b": Family(
        config=lambda: hf.LlavaConfig(
            text_config=vicuna_7b(), vision_config=clip_large(), image_token_index=32000
        ),
        model="LlavaForConditionalGeneration",
        renames=LLAVA_RENAMES,
        preprocessor={**CLIP_PREPROCESSOR, "image_processor_type": "CLIPImageProcessor"},
        chat_template=VICUNA_TEMPLATE,
        special_tokens=LLAMA_TOKENS,
    ),
    "qwen2.5-vl-3b": _qwen_family(qwen2_5_vl_3b),
    "qwen2.5-vl-7b": _qwen_family(qwen2_5_vl_7b),
    "tiny": _llava_next_family(tiny),
}


def make_checkpoint(
    folder: Path, *, family: Family, num_layers: int | None, dtype: str, shard_bytes: int
) -> int:
    """Write a random checkpoint into ``folder`` and return the number of its decoder layers."""
    config = family.config()
    if num_layers is not None:
        config.text_config.num_hidden_layers = num_layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:1] * num_layers
    config.architectures, config.dtype = [family.model], dtype
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    _write_weights(folder, _shapes(config, family), dtype=dtype, shard_bytes=shard_bytes)
    _write_processor(folder, family)
    return int(config.text_config.num_hidden_layers)


def _shapes(config: Any, family: Family) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape under its released name; the model is built without memory."""
    with torch.device("meta"):
        state = getattr(hf, family.model)(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {_released_name(name, family): tuple(t.shape) for name, t in state.items() if name not in tied}


def _released_name(name: str, family: Family) -> str:
    for pattern, replacement in family.renames:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], *, dtype: str, shard_bytes: int) -> None:
    size = getattr(torch, dtype).itemsize
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        used += math.prod(shape) * size
        if used > shard_bytes and shards[-1]:
            shards.append({})
            used = math.prod(shape) * size
        shards[-1][name] = shape
    generator = np.random.default_rng(0)
    piece = torch.from_numpy(generator.standard_normal(PIECE, dtype=np.float32)).mul(0.02)
    raw = memoryview(piece.to(getattr(torch, dtype)).view(torch.uint8).numpy())
    one = torch.ones(1, dtype=getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (folder / file).open("wb") as stream:
            stream.write(_header(shard, dtype=dtype, size=size))
            for name, shape in shard.items():
                if len(shape) == 1 and name.endswith("weight"):  # a norm
                    stream.write(one * shape[0])
                    continue
                start = size * int(generator.integers(PIECE))
                for part in _cyclic(raw, start, math.prod(shape) * size):
                    stream.write(part)
    total = size * sum(math.prod(shape) for shape in shapes.values())
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    (folder / "model.safetensors.index.json").write_text(index_text)


def _cyclic(raw: memoryview, start: int, count: int) -> Iterator[memoryview]:
    while count:
        part = raw[start : start + count]
        yield part
        count -= len(part)
        start = 0


def _header(shapes: dict[str, tuple[int, ...]], *, dtype: str, size: int) -> bytes:
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * size
        entries[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_processor(folder: Path, family: Family) -> None:
    special = family.special_tokens
    words = [special.get(index, f"w{index}") for index in range(max(special) + 1)]
    unknown = special.get(0, words[0])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special.values()])
    begin = special.get(1)
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, 1)]
        )
    end = 2 if begin is not None else 151645
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=special[end]
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(family.preprocessor, indent=1))
    (folder / "chat_template.jinja").write_text(family.chat_template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))


# --------------------------------------------------------------------------------------------- measuring


@dataclass
class Peaks:
    """Largest memory of a process, in bytes, while it ran."""

    resident: int = 0
    anonymous: int = 0
    mapped: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def watch(self, pid: int) -> threading.Thread:
        """Start a thread that samples process ``pid`` until ``stop`` or its end."""
        thread = threading.Thread(target=self._sample, args=(pid,), daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        self._done.set()

    def _sample(self, pid: int) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            try:
                text = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                return
            kib = {name: int(count) for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
            if "VmHWM" in kib:  # a process that has ended has no memory
                self.resident = max(self.resident, 1024 * kib["VmHWM"])
                self.anonymous = max(self.anonymous, 1024 * kib["RssAnon"])
                self.mapped = max(self.mapped, 1024 * (kib["RssFile"] + kib["RssShmem"]))


def forget(files: Iterable[Path]) -> None:
    """Write the files out and drop them from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def time_copy(files: list[Path], folder: Path) -> Step:
    """Return what one plain copy of ``files`` took; the copy is deleted again."""
    forget(files)
    folder.mkdir()
    start, cpu_start = time.perf_counter(), time.process_time()
    for file in files:
        shutil.copyfile(file, folder / file.name)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    shutil.rmtree(folder)
    return Step("a plain copy of the weight files, for comparison", seconds, cpu_seconds)


@dataclass(frozen=True)
class Step:
    """A step of ``trio-export``: what it printed at its start, and what the step took."""

    name: str
    seconds: float
    cpu_seconds: float


def time_export(checkpoint: Path, bundle: Path, arguments: list[str]) -> tuple[list[Step], Peaks]:
    """Run ``trio-export`` and return its steps and its peak memory."""
    code = "import sys; from trio_edge.export.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(checkpoint), "--out", str(bundle), *arguments]
    peaks, marks, last_line = Peaks(), [("starting", time.perf_counter(), 0.0)], ""
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    ) as child:
        watcher = peaks.watch(child.pid)
        assert child.stderr is not None
        for line in child.stderr:
            last_line = line.strip()
            if last_line.startswith(STEPS):
                marks.append((last_line, time.perf_counter(), _cpu_seconds(child.pid)))
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        marks.append(("", time.perf_counter(), usage.ru_utime + usage.ru_stime))
        peaks.stop()
        watcher.join()
    if child.returncode:
        raise SystemExit(last_line)
    peaks.resident = max(peaks.resident, 1024 * usage.ru_maxrss)
    steps = [
        Step(name, after - before, cpu_after - cpu_before)
        for (name, before, cpu_before), (_, after, cpu_after) in zip(marks, marks[1:])
    ]
    return steps, peaks


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def time_graph(bundle: Path, name: str, *, mapped: bool, threads: int) -> str:
    """Load and run one graph in a process of its own; return a row of the table."""
    forget(bundle.rglob("*.safetensors"))
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_run_graph, args=(bundle, name, mapped, threads, writer))
    peaks = Peaks()
    child.start()
    watcher = peaks.watch(child.pid or 0)
    writer.close()
    try:
        rows, weights, load, run = reader.recv()
    except EOFError:
        child.join()
        return f"| {name} | ended with exit code {child.exitcode} |"
    finally:
        peaks.stop()
    child.join()
    watcher.join()
    return (
        f"| {name} | {'mapped' if mapped else 'usual'} | {rows} | {gigabytes(weights)} | {load:.1f} s"
        f" | {run:.1f} s | {gigabytes(peaks.resident)} | {gigabytes(peaks.anonymous)} | {gigabytes(peaks.mapped)} |"
    )


def _run_graph(bundle: Path, graph: str, mapped: bool, threads: int, writer: Any) -> None:
    """Load and run ``graph`` with random inputs."""
    opened = open_bundle(bundle)
    name, _, profile = graph.partition(":")
    spec = opened.manifest.graph(name)
    chosen = next(entry for entry in spec.profiles if profile in ("", entry.name))
    sizes = chosen.sizes
    generator = np.random.default_rng(0)
    indices = {"position_ids": 0, "visual_rows": 10}  # first of ascending values
    scalars = {"num_visual": sizes.get("N", 0), "length": sizes.get("S", 1)}  # others are 0
    inputs = {}
    for tensor in spec.inputs:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
        if tensor.name in indices:
            ascending = indices[tensor.name] + np.arange(shape[-1], dtype=np.int32)
            inputs[tensor.name] = np.broadcast_to(ascending, shape).copy()
        elif tensor.dtype == "int32":
            inputs[tensor.name] = np.full(shape, scalars.get(tensor.name, 0), np.int32)
        else:
            inputs[tensor.name] = generator.standard_normal(shape, dtype=np.float32).astype(tensor.dtype)
    start = time.perf_counter()
    run = (
        _mapped_session(opened.folder / spec.file, threads)
        if mapped
        else _usual_session(opened, name, chosen.name, threads)
    )
    loaded = time.perf_counter()
    outputs = run(inputs)
    done = time.perf_counter()
    if not all(np.isfinite(values).all() for values in outputs):
        raise SystemExit(f"{name}: the outputs are not finite")
    writer.send((sizes.get("S", sizes.get("B")), spec.weight_bytes, loaded - start, done - loaded))


def _usual_session(
    bundle: Bundle, name: str, profile: str, threads: int
) -> Callable[[dict[str, Any]], Iterable[Any]]:
    from trio_edge.runtime.backend import make_backend
    from trio_edge.runtime.graph_run import GraphRun

    graphs = make_backend("onnxruntime", threads=threads).load(bundle, [name])
    return lambda inputs: GraphRun(graphs, name, profile=profile).run(inputs).values()


def _mapped_session(file: Path, threads: int) -> Callable[[dict[str, Any]], Iterable[Any]]:
    """Load a graph so that its weights stay in the file: nothing transposes, converts or packs them beforehand.

    On x86, ONNX Runtime's CPU has no float16 products. Its extended optimizations turn all weights into float32 in memory when
    it loads a graph; without them each is converted when it is used, and forgotten.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(
        file, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
    return lambda inputs: session.run(None, inputs)


# --------------------------------------------------------------------------------------------------- the table


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def conditions(options: argparse.Namespace, num_layers: int, folder: Path) -> str:
    found = subprocess.run(
        ["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=False
    )
    system = found.stdout.strip() or "unknown file system"
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (
        f"{options.family}, {num_layers} decoder layers, {options.dtype}, {' '.join(options.export)}; {system},"
        f" {os.cpu_count()} CPUs ({model[1] if model else platform.machine()}), Python {platform.python_version()}, torch"
        f" {torch.__version__}, transformers {hf.__version__}; weight files not in the page cache"
    )


def export_table(steps: list[Step], copy: Step, peaks: Peaks) -> list[str]:
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault("tracing" if step.name.startswith("tracing") else step.name, []).append(step)
    rows = [*groups.items(), ("**all of trio-export**", steps), (copy.name, [copy])]
    return [
        "| step | seconds | CPU seconds |", "|---|---|---|",
        *(
            f"| {name} | {sum(step.seconds for step in group):.1f} | {sum(step.cpu_seconds for step in group):.1f} |"
            for name, group in rows
        ),
        "",
        f"peak memory {gigabytes(peaks.resident)}, of it at most {gigabytes(peaks.anonymous)} anonymous",
    ]  # fmt: skip


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=list(FAMILIES), default="llava-next-7b")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the family's)")
    parser.add_argument(
        "--dtype", choices=list(SAFETENSORS_DTYPES), default="float16", help="of the checkpoint"
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest weight file")
    parser.add_argument(
        "--folder", type=Path, default=Path("out/export-scale"), help="new folder for everything"
    )
    parser.add_argument("--export", nargs=argparse.REMAINDER, default=[], help="the rest goes to trio-export")
    parser.add_argument(
        "--graphs",
        nargs="*",
        default=["prefix", "select_1"],
        help="graphs to run, at their smallest profile or at GRAPH:PROFILE",
    )
    parser.add_argument("--sessions", nargs="+", choices=["usual", "mapped"], default=["usual", "mapped"])
    parser.add_argument("--threads", type=int, default=2, help="ONNX Runtime's")
    parser.add_argument("--checkpoint-only", action="store_true", help="make the checkpoint, keep it, stop")
    parser.add_argument(
        "--keep-files", action="store_true", help="keep checkpoint and bundle, reuse them next time"
    )
    options = parser.parse_args()
    checkpoint, bundle = options.folder / "checkpoint", options.folder / "bundle"
    if not checkpoint.exists():
        start = time.perf_counter()
        make_checkpoint(
            checkpoint,
            family=FAMILIES[options.family],
            num_layers=options.layers,
            dtype=options.dtype,
            shard_bytes=int(1e9 * options.shard_gb),
        )
        print(
            f"made {gigabytes(folder_bytes(checkpoint))} in {time.perf_counter() - start:.0f} s", flush=True
        )
    if options.checkpoint_only:
        return
    try:
        report(checkpoint, bundle, options)
    finally:
        if not options.keep_files:
            shutil.rmtree(bundle, ignore_errors=True)
            shutil.rmtree(checkpoint, ignore_errors=True)


def report(checkpoint: Path, bundle: Path, options: argparse.Namespace) -> None:
    files = sorted(checkpoint.glob("*.safetensors"))
    if not (bundle / MANIFEST_NAME).exists():
        copy = time_copy(files, options.folder / "copy")
        forget(files)
        steps, peaks = time_export(checkpoint, bundle, options.export)
        manifest = open_bundle(bundle).manifest
        source, target = folder_bytes(checkpoint), folder_bytes(bundle)
        print(conditions(options, manifest.dimensions.num_layers, bundle))
        print("\n".join(export_table(steps, copy, peaks)))
        print(
            f"checkpoint {gigabytes(source)}, bundle {gigabytes(target)} ({target / source:.4f}x)\n",
            flush=True,
        )
    if options.graphs:
        print("| graph | session | rows | weights | load | first run | peak memory | anonymous | mapped |")
        print("|---|---|---|---|---|---|---|---|---|")
    for name in options.graphs:
        for session in options.sessions:
            print(time_graph(bundle, name, mapped=session == "mapped", threads=options.threads), flush=True)


if __name__ == "__main__":
    main()
