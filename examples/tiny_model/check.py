"""Measures a checkpoint folder with Hugging Face's processor, chat template and `generate()`.

`python examples/tiny_model/check.py export/tiny --count 700` prints exact match by kind. `--demo DIR` writes the demo images
instead: for each size one held-out image, with questions that the checkpoint answers correctly.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from shapes.questions import KINDS
from shapes.samples import HELD_OUT_OFFSET, held_out, samples_of
from shapes.scene import CANVASES, make_scene
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

DEMO_SIZES = ((96, 96), (144, 48), (48, 144), (200, 150))
DEMO_KINDS = ["color", "digit", "place", "count", "comparison", "existence"]


class Answerer:
    """Answers questions with a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.processor = LlavaNextProcessor.from_pretrained(folder)
        self.model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def answer(self, picture: Image.Image, question: str) -> str:
        """Returns the generated answer."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(images=picture, text=prompt, return_tensors="pt")
        tokens = self.model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(tokens, skip_special_tokens=True)


def measure(answerer: Answerer, count: int, seed: int) -> None:
    """Prints exact match by kind and by image size."""
    right: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for sample in held_out(count, seed=seed):
        ok = answerer.answer(sample.images[0], sample.question) == sample.answer
        for key in (sample.kind, "{}x{}".format(*sample.images[0].size), "all"):
            right[key] += ok
            seen[key] += 1
    for key in (*KINDS, *sorted(set(seen) - {*KINDS, "all"}), "all"):
        print(f"{key:12} {100 * right[key] / seen[key]:5.1f} %  n={seen[key]}")


def write_demo(answerer: Answerer, folder: Path) -> None:
    """Writes one image per demo size, and `questions.json` with correctly answered questions."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, size in enumerate(DEMO_SIZES):
        canvas = next(c for c in CANVASES if (c.width, c.height) == size)
        first = HELD_OUT_OFFSET + 90_000_000 + 1000 * number
        for seed in range(first, first + 1000):
            samples = samples_of(make_scene(seed, canvas=canvas), DEMO_KINDS)
            right = [s for s in samples if answerer.answer(s.images[0], s.question) == s.answer]
            if len(right) >= 5:
                break
        name = f"shapes-{size[0]}x{size[1]}.png"
        right[0].images[0].save(folder / name, optimize=True)
        entries += [{"file": name, "question": s.question, "answer": s.answer, "kind": s.kind} for s in right]
    (folder / "questions.json").write_text(json.dumps(entries, indent=1) + "\n")


def main() -> None:
    """Parses the arguments and measures or writes the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("--count", type=int, default=350, help="held-out samples")
    parser.add_argument("--seed", type=int, default=0, help="held-out stream")
    parser.add_argument("--demo", type=Path, help="folder to write the demo images to, instead of measuring")
    args = parser.parse_args()
    answerer = Answerer(args.folder)
    if args.demo:
        write_demo(answerer, args.demo)
    else:
        measure(answerer, args.count, args.seed)


if __name__ == "__main__":
    main()
