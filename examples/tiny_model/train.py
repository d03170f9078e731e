"""Trains the tiny model from scratch and packages it: images, vision tower, decoder in three depths, checkpoint.

`python examples/tiny_model/train.py --out DIR` runs all stages on a CPU or a GPU. A stage whose checkpoint is in DIR is not run
again. `--smoke` runs each stage for a few seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from data import Group, make_groups
from model import grow, make_model
from package import package
from safetensors.torch import load_file, save_file
from stage_language import Lesson, PlaceReader, Recipe, evaluate, make_lessons, train_language
from stage_vision import train_vision, vision_accuracy
from transformers import LlavaNextForConditionalGeneration

TRAIN_SEED = 1_000_000
VALIDATION_SEED = 500_000_000
SHARES = {"vision": 0.23, "depth4": 0.18, "depth8": 0.30, "depth16": 0.29}
PLACES_IN_8 = [0, 1, 3, 5]
PLACES_IN_16 = [0, 1, 2, 4, 6, 8, 10, 12]
KIND_WEIGHTS = [1.0, 1.0, 1.0, 1.2, 1.4, 1.2, 0.8]


def _save(model: LlavaNextForConditionalGeneration, path: Path) -> None:
    """Writes a model's weights."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def _load(path: Path, num_layers: int, device: str) -> LlavaNextForConditionalGeneration:
    """Returns a model with the weights of a stage."""
    model = make_model(num_layers)
    model.load_state_dict(load_file(path))
    return model.to(device).eval()


def _vision_stage(groups: list[Group], check: list[Group], out: Path, seconds: float, device: str) -> None:
    """Trains the vision tower and writes `vision.safetensors`."""
    torch.manual_seed(0)
    model = make_model(4).to(device)
    reader = train_vision(model, groups, seconds=seconds)
    print("vision end", vision_accuracy(model.eval(), reader, check[0]), flush=True)
    _save(model, out / "vision.safetensors")


def _recipes(seconds: float) -> dict[str, tuple[int, list[int], Recipe]]:
    """Returns depth, places of the layers before, and recipe of every decoder stage."""
    part = {name: share * seconds for name, share in SHARES.items()}
    return {
        "depth4": (4, [0, 1, 2, 3], Recipe(part["depth4"], 1.5e-3)),
        "depth8": (8, PLACES_IN_8, Recipe(part["depth8"], 1.5e-3, deep=0.3)),
        "depth16": (
            16,
            PLACES_IN_16,
            Recipe(part["depth16"], 1.2e-3, final_rate=0.02, full_share=0.15, full_share_end=0.4, deep=0.2),
        ),
    }


def _language_stages(
    lessons: list[Lesson], check: list[Lesson], out: Path, seconds: float, device: str
) -> LlavaNextForConditionalGeneration:
    """Trains the decoder at 4, 8 and 16 layers and returns the last model."""
    model = _load(out / "vision.safetensors", 4, device)
    aid = PlaceReader().to(device)
    for number, (name, (depth, places, recipe)) in enumerate(_recipes(seconds).items()):
        path = out / f"{name}.safetensors"
        if path.exists():
            model = _load(path, depth, device)
            continue
        if depth > len(model.model.language_model.layers):
            model = grow(model, places, depth).to(device).eval()
        part = out / f"{name}.part.safetensors"
        if part.exists():
            model = _load(part, depth, device)
        train_language(
            model, lessons, aid, recipe, seed=number, name=name, validation=check,
            save=lambda m, part=part: _save(m, part),
        )  # fmt: skip
        _save(model, path)
        part.unlink(missing_ok=True)
        package(grow(model, list(range(depth)), 16), out / "package")
    return model


def _final_report(model: LlavaNextForConditionalGeneration, check: list[Lesson], out: Path) -> None:
    """Prints and writes the accuracies of the packaged weights."""
    rounded = LlavaNextForConditionalGeneration.from_pretrained(out / "package", dtype=torch.float32)
    rounded = rounded.to(model.device).eval()
    report = {
        "fp32": evaluate(model, check, layers=(1, 2, 4, 8)),
        "fp16 weights": evaluate(rounded, check),
        "another picture": evaluate(rounded, check, other=True),
        "base tile only": evaluate(rounded, check, base_only=True),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, row in report.items():
        print(name, row, flush=True)


def main() -> None:
    """Parses the arguments and runs all stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the package")
    parser.add_argument(
        "--minutes", type=float, default=60, help="wall-clock minutes of training, all stages together"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--pictures", type=int, default=40_000, help="training pictures")
    parser.add_argument("--smoke", action="store_true", help="run every stage for a few seconds")
    args = parser.parse_args()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    seconds, pictures, checked = args.minutes * 60, args.pictures, 600
    if args.smoke:
        seconds, pictures, checked = 20.0, 600, 100
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    groups, check = make_groups(TRAIN_SEED, pictures), make_groups(VALIDATION_SEED, checked)
    print(f"{pictures} pictures drawn in {time.time() - started:.0f}s", flush=True)
    if not (args.out / "vision.safetensors").exists():
        _vision_stage(groups, check, args.out, SHARES["vision"] * seconds, device)
    tower = _load(args.out / "vision.safetensors", 4, device)
    lessons = make_lessons(tower, groups, questions=32, weights=KIND_WEIGHTS)
    checks = make_lessons(tower, check, questions=16)
    print(f"lessons ready after {time.time() - started:.0f}s", flush=True)
    model = _language_stages(lessons, checks, args.out, seconds, device)
    _final_report(model, checks, args.out)


if __name__ == "__main__":
    main()
