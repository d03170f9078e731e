"""Trains the small VLM on drawn shapes: a projector onto SmolLM2-135M, and low-rank updates of its layers.

    PYTHONPATH=examples/tiny_model:benchmarks python examples/small_vlm/train.py out/small-vlm-training --seconds 1650

The packaged model's vision tower is frozen, and runs once for each image. Several questions share their image's rows: each sees the
image and itself. Most steps leave out patches without an object. The projector starts as a regression onto the embeddings of each
patch's colour and name. What is trained is saved now and then, and a later call goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import data
import torch
from decoder import SmallVlm
from model import normalize
from real_weights.checkpoints import checkpoint
from safetensors.torch import save_file
from sentences import KINDS, decided_at, in_words
from shapes.scene import COLOR_NAMES, make_scene
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

if TYPE_CHECKING:
    from collections.abc import Sequence

TINY = Path(__file__).resolve().parents[2] / "export" / "tiny"
CHECKED, FEW, TRAINED = (500_000_000, 160), (40_000_000, 1666), (1_000_000, 5000)
"""First seed and number of images: held out, with few objects, and as the tiny model's."""
OPEN, CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
WEIGHTS = (0.32, 0.28, 0.2, 0.2)
IMAGES, QUESTIONS = 3, 8
"""Images of a step, and most questions about each."""
PROJECTOR_SECONDS = 40
KEPT = (12, 16, 24, 32, 48)


class Asked(NamedTuple):
    """A question and its answer as tokens."""

    kind: str
    question: list[int]
    answer: list[int]
    decided: int
    """Place in the answer that depends on the image."""


class Lesson(NamedTuple):
    """Images of one layout, with questions about each."""

    features: Tensor
    """[images, patches + 1, 128], float16; the last patch stands for a newline and is zero."""
    order: Tensor
    """[N], patch of each visual token."""
    labels: Tensor
    """[images, N, 6]."""
    asked: list[list[Asked]]


class Batch(NamedTuple):
    """Rows that enter the decoder, and the tokens that should come after some of them."""

    states: Tensor
    positions: Tensor
    mask: Tensor
    places: Tensor
    """[T, 2], sequence and row before each token."""
    tokens: Tensor
    is_key: Tensor
    """[T], whether the token depends on the image."""
    questions: list[tuple[int, int]]
    """Sequence and number of the question that each token answers."""


class Teacher:
    """Makes lessons and batches."""

    def __init__(self, real: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(real / "tokenizer.json"))
        tiny = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32).eval()
        self.tower = tiny.model.vision_tower

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    @torch.no_grad()
    def lessons(self, first_seed: int, count: int, *, few: bool = False) -> list[Lesson]:
        canvases = data.CANVASES
        if few:
            canvases = tuple(
                dataclasses.replace(one, num_objects=(2, 4) if one.width == one.height == 96 else (1, 3))
                for one in canvases
            )
        found = []
        with mock.patch.object(data, "CANVASES", canvases):
            for group in data.make_groups(first_seed, count, workers=1):
                parts = []
                for tiles in torch.from_numpy(group.tiles).split(32):
                    seen = self.tower(pixel_values=normalize(tiles.flatten(0, 1))).last_hidden_state[:, 1:]
                    parts.append(seen.reshape(len(tiles), -1, seen.shape[-1]).half())
                features = F.pad(torch.cat(parts), (0, 0, 0, 1))
                order = torch.tensor(group.layout.order)
                order = torch.where(order < 0, features.shape[1] - 1, order)
                labels = F.pad(torch.from_numpy(group.labels).long(), (0, 0, 0, 1))[:, order]
                scenes = [
                    make_scene(seed, canvas=canvases[one]) for seed, one in zip(group.seeds, group.canvases)
                ]
                found.append(Lesson(features, order, labels, [*map(self.asked, scenes)]))
        return found

    def asked(self, scene: data.Scene) -> list[Asked]:
        """Return up to ten questions about a scene."""
        pairs = data.questions_of(scene, f"ask {scene.seed}", count=30, kinds=KINDS, weights=WEIGHTS)
        found = []
        for kind, question, answer in [pair for pair in pairs if " in the " not in pair[1]][:10]:
            text, sentence = in_words(kind, question, answer)
            decided = len(self.ids(decided_at(kind, question, answer)))
            ids = self.ids(sentence + "<|im_end|>")
            found.append(Asked(kind, self.ids(text + CLOSE), ids, min(decided, len(ids) - 1)))
        return found

    def batch(
        self,
        model: SmallVlm,
        lesson: Lesson,
        images: Sequence[int],
        asked: Sequence[Sequence[Asked]],
        *,
        keep: int | None,
        shown: Sequence[int] | None = None,
    ) -> Batch:
        """Return the rows of ``asked`` questions about ``images``, or with the images ``shown`` in their place."""
        shown = [*(images if shown is None else shown)]
        labels = lesson.labels[shown]
        chosen = torch.arange(len(lesson.order)).expand(len(shown), -1)
        if keep is not None:
            score = torch.rand(labels.shape[:2]) + 1.0 * (labels[..., 0] > 0) + labels[..., 4]
            chosen = score.topk(min(keep, labels.shape[1]), 1).indices.sort(1).values
        patches = lesson.order[chosen]
        features = lesson.features[shown].float()
        tokens = model.project(features.gather(1, patches[..., None].expand(-1, -1, features.shape[-1])))
        tokens = torch.where((patches == features.shape[1] - 1)[..., None], model.newline, tokens)
        start, gap = self.ids(OPEN), self.ids("\n")
        first = len(start) + tokens.shape[1] + len(gap)
        rows = [[id for one in questions for id in (one.question + one.answer)[:-1]] for questions in asked]
        longest = max(map(len, rows))
        owner = torch.full((len(rows), first + longest), 99)
        owner[:, :first] = 0
        positions = torch.arange(first).repeat(len(rows), 1)
        positions = F.pad(positions, (0, longest))
        places, wanted, is_key, questions_of = [], [], [], []
        for sequence, questions in enumerate(asked):
            row = first
            for number, one in enumerate(questions, 1):
                count = len(one.question) + len(one.answer) - 1
                owner[sequence, row : row + count] = number
                positions[sequence, row : row + count] = torch.arange(first, first + count)
                for place, token in enumerate(one.answer):
                    places.append((sequence, row + len(one.question) - 1 + place))
                    wanted.append(token)
                    is_key.append(place == one.decided)
                    questions_of.append((sequence, number))
                row += count
        causal = torch.ones(first + longest, first + longest, dtype=torch.bool).tril()
        mask = causal & ((owner[:, None] == 0) | (owner[:, None] == owner[:, :, None]))
        text = model.embedding[torch.tensor([row + [0] * (longest - len(row)) for row in rows])]
        around = (model.embedding[ids].expand(len(rows), -1, -1) for ids in (start, gap))
        before, after = around
        states = torch.cat([before, tokens, after, text], 1)
        return Batch(
            states,
            positions,
            mask[:, None],
            torch.tensor(places),
            torch.tensor(wanted),
            torch.tensor(is_key),
            questions_of,
        )


def logits_of(model: SmallVlm, batch: Batch) -> Tensor:
    states = model(batch.states, batch.positions, batch.mask)
    return F.linear(states[batch.places[:, 0], batch.places[:, 1]], model.embedding)


@torch.no_grad()
def right_sentences(
    teacher: Teacher, model: SmallVlm, lessons: Sequence[Lesson], *, other: bool
) -> dict[str, float]:
    """Return the share of exact sentences in percent by kind, all visual tokens seen, with each image or the next one."""
    right: dict[str, list[bool]] = {}
    for lesson in lessons:
        images = [index for index, asked in enumerate(lesson.asked) if asked]
        for start in range(0, len(images), 6):
            some = images[start : start + 6]
            shown = [(index + 1) % len(lesson.asked) for index in some] if other else None
            asked = [lesson.asked[index][:QUESTIONS] for index in some]
            batch = teacher.batch(model, lesson, some, asked, keep=None, shown=shown)
            hits = logits_of(model, batch).argmax(-1) == batch.tokens
            whole: dict[tuple[int, int], bool] = {}
            for key, hit in zip(batch.questions, hits.tolist()):
                whole[key] = whole.get(key, True) and hit
            for (sequence, number), is_right in whole.items():
                right.setdefault(asked[sequence][number - 1].kind, []).append(is_right)
    right["all"] = [hit for hits in right.values() for hit in hits]
    return {kind: round(100 * sum(hits) / len(hits), 1) for kind, hits in right.items()}


def start_projector(teacher: Teacher, model: SmallVlm, lessons: Sequence[Lesson]) -> None:
    """Let a patch's visual token begin as the sum of the embeddings of its colour and its name."""
    names, colors = (
        torch.stack([model.embedding[teacher.ids(f" {word}")[-1]] for word in words])
        for words in (data.NAMES, COLOR_NAMES)
    )
    labels = torch.cat([lesson.labels.flatten(0, 1) for lesson in lessons])
    features = torch.cat([lesson.features[:, lesson.order].flatten(0, 1) for lesson in lessons])
    features, labels = features[labels[:, 0] > 0], labels[labels[:, 0] > 0]
    projector = [*model.one.parameters(), *model.two.parameters()]
    optimizer, start = torch.optim.Adam(projector, 2e-3), time.monotonic()
    while (part := (time.monotonic() - start) / PROJECTOR_SECONDS) < 1:
        some = torch.randint(0, len(features), (512,))
        wanted = names[labels[some, 0] - 1] + colors[labels[some, 1]]
        loss = F.mse_loss(model.project(features[some].float()), wanted)
        optimizer.param_groups[0]["lr"] = 2e-3 * max(0.02, 1 - part)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(out: Path, *, seconds: float, real: Path, scale: float) -> None:
    """Train for ``seconds``, save the adapter, and print how many held-out sentences are right."""
    folder = checkpoint("llava", real)
    torch.manual_seed(0)
    teacher, model, rng = Teacher(folder), SmallVlm(folder), random.Random(0)
    sets = [(first, max(CHECKED[1], round(count * scale))) for first, count in (CHECKED, FEW, TRAINED)]
    checked, few, many = (teacher.lessons(*one, few=index == 1) for index, one in enumerate(sets))
    low = [*model.layers.parameters()]
    rest = [one for name, one in model.named_parameters() if not name.startswith("layers")]
    optimizer = torch.optim.AdamW([{"params": low}, {"params": rest}], betas=(0.9, 0.98), weight_decay=0.0)
    used, step, state_file = 0.0, 0, out / "state.pt"
    out.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        used, step = state["used"], state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        start_projector(teacher, model, many)
    while used < seconds:
        start, part = time.monotonic(), used / seconds
        lessons = few if rng.random() < max(0.25, 1 - 2 * part) else many
        (lesson,) = rng.choices(lessons, [len(one.asked) for one in lessons])
        images = rng.sample([index for index, asked in enumerate(lesson.asked) if asked], IMAGES)
        asked = [
            rng.sample(lesson.asked[index], min(QUESTIONS, len(lesson.asked[index]))) for index in images
        ]
        is_whole = rng.random() < (0.08 if part < 0.5 else 0.2)
        batch = teacher.batch(model, lesson, images, asked, keep=None if is_whole else rng.choice(KEPT))
        factor = min(1, (step + 1) / 40) * min(1.0, max(0.03, (1 - part) / 0.5))
        for group, rate in zip(optimizer.param_groups, (1e-3, 5e-4)):
            group["lr"] = rate * factor
        each = F.cross_entropy(logits_of(model, batch), batch.tokens, reduction="none")
        weights = torch.where(batch.is_key, 1.0, 0.15)
        loss = (each * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*low, *rest], 1.0)
        optimizer.step()
        used, step = used + time.monotonic() - start, step + 1
        if step % 20 == 0:
            print(
                f"step {step}, {used:.0f} s, loss at the deciding token {each[batch.is_key].mean():.3f}",
                flush=True,
            )
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "used": used,
                "step": step,
            }
            torch.save(state, state_file.with_suffix(".partial"))
            state_file.with_suffix(".partial").replace(state_file)
    save_file(
        {name: one.half().contiguous() for name, one in model.state_dict().items()},
        out / "adapter.safetensors",
    )
    for other in (False, True):
        found = right_sentences(teacher, model, checked, other=other)
        print("other image" if other else "right sentences, %", found, flush=True)


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=1650.0)
    parser.add_argument("--real", type=Path, default=Path("out/real"), help="folder of the decoder's file")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images, for a quick try")
    options = parser.parse_args()
    train(options.out, seconds=options.seconds, real=options.real, scale=options.scale)


if __name__ == "__main__":
    main()
