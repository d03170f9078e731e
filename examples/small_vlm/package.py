"""Writes the small VLM as a LLaVA-NeXT checkpoint: the tiny model's tower, the projector, and SmolLM2-135M with its updates merged.

PYTHONPATH=benchmarks python examples/small_vlm/package.py out/small-vlm
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from real_weights.checkpoints import IMAGE_ID, checkpoint
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from trio_edge.runtime.decisions.wording import WORDS_TEMPLATE
from trio_edge.runtime.prompts.chat import LLAVA_ONEVISION_TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "export" / "tiny"
ADAPTER = Path(__file__).parent / "adapter.safetensors"
PARTS = {  # rows of a joined weight, and the weights it is made of
    "qkv": {"self_attn.q_proj": 576, "self_attn.k_proj": 192, "self_attn.v_proj": 192},
    "o": {"self_attn.o_proj": 576},
    "gu": {"mlp.gate_proj": 1536, "mlp.up_proj": 1536},
    "down": {"mlp.down_proj": 576},
}
SCALE = 2.0


def make_checkpoint(adapter: Path, folder: Path, real: Path) -> None:
    """Write the checkpoint folder with the trained weights of ``adapter``; ``real`` holds the decoder's file."""
    tiny = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(checkpoint("llava", real), dtype=torch.float32)
    trained = {name: value.float() for name, value in load_file(adapter).items()}
    vision = AutoConfig.from_pretrained(TINY)
    config = LlavaNextConfig(
        vision_config=vision.vision_config,
        text_config=base.config.text_config,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=vision.image_grid_pinpoints,
        image_seq_length=36,
        tie_word_embeddings=True,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tiny.model.vision_tower.state_dict())
    decoder = base.get_decoder().state_dict()
    for number in range(config.text_config.num_hidden_layers):
        for part, weights in PARTS.items():
            update = SCALE * trained[f"layers.{number}.{part}.b"] @ trained[f"layers.{number}.{part}.a"]
            for name, rows in zip(weights, update.split(list(weights.values()))):
                decoder[f"layers.{number}.{name}.weight"] += rows
    model.get_decoder().load_state_dict(decoder)
    projector = model.model.multi_modal_projector
    projector.linear_1.load_state_dict({"weight": trained["one.weight"], "bias": trained["one.bias"]})
    projector.linear_2.load_state_dict({"weight": trained["two.weight"], "bias": trained["two.bias"]})
    model.model.image_newline.data.copy_(trained["newline"])
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llava", real))
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor.from_pretrained(TINY),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_ONEVISION_TEMPLATE,
    ).save_pretrained(folder)
    # It was trained on bare questions, without "Answer with yes or no."
    (folder / "decision_template.jinja").write_text(WORDS_TEMPLATE)


def main() -> None:
    """Parse the arguments and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="checkpoint folder")
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--real", type=Path, default=Path("out/real"), help="folder of the decoder's file")
    options = parser.parse_args()
    make_checkpoint(options.adapter, options.out, options.real)
    print(options.out)


if __name__ == "__main__":
    main()
