"""Stage 2: the decoder learns to answer, 4 layers first, then 8, then 16, on visual tokens of the frozen tower.

Many short questions share one image per step. In most steps visual tokens are dropped early, patches without objects first, and
positions become compact: this is cheaper, and the model learns to work with token reduction. Two heads of three early layers
are guided to attend to the objects that a question is about.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from data import Group, questions_of
from model import EOS, PAD, TOKEN_ID, Drop, Watch, decode, head_logits, pack, tile_features
from shapes.questions import KINDS, PLURALS
from shapes.scene import CANVASES, PLACES, Scene, make_scene
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration

MAX_QUESTION = 13
OPENINGS = (
    "", "look at this picture .", "answer the question .", "please answer .", "look .", "you see this image .",
)  # fmt: skip
_NEUTRAL_WORDS = ("object", "objects", "in", "the", "more", "larger")


@dataclass
class Lesson:
    """One group ready for the decoder: patch features, token labels, and questions.

    `ids` is `[n, Q, 13]` (question, assistant:, answer), `where` the index of `assistant:`, `kind` the kind's number,
    `about` the objects asked about, one bit each.
    """

    group: Group
    features: Tensor
    labels: Tensor
    ids: np.ndarray
    where: np.ndarray
    kind: np.ndarray
    about: np.ndarray


def encode(question: str, answer: str) -> list[int]:
    """Returns token ids of `question assistant: answer`."""
    return [TOKEN_ID[word] for word in (*question.split(), "assistant:", answer)]


def _about(scene: Scene, kind: str, question: str) -> int:
    """Returns the objects that a question asks about as bits."""
    words = question.split()
    parts = {
        "color": [words[4:-1]], "shape": [words[4:-1]], "count": [words[2:-3]], "digit": [["digit", words[-2]]],
        "place": [words[3:-1]], "existence": [words[3:-1]],
    }  # fmt: skip
    if kind == "comparison":
        than = words.index("than")
        parts[kind] = [words[2:than], words[than + 1 : -1]]
    bits = 0
    for number, thing in enumerate(scene.things):
        facts = {thing.name, thing.color, thing.size, thing.place, *_NEUTRAL_WORDS}
        facts |= {"digit", "digits"} if thing.is_digit else {PLURALS[thing.name]}
        if any(facts.issuperset(part) for part in parts[kind]):
            bits |= 1 << number
    return bits


def _question_arrays(group: Group, count: int, weights: list[float] | None) -> tuple[np.ndarray, ...]:
    """Returns tokenised questions of all pictures of a group; short lists are repeated to `count`."""
    n = len(group.seeds)
    ids = np.full((n, count, MAX_QUESTION), PAD, np.int64)
    where, kinds, about = (np.zeros((n, count), np.int64) for _ in range(3))
    for row, (seed, canvas) in enumerate(zip(group.seeds, group.canvases)):
        scene = make_scene(seed, canvas=CANVASES[canvas])
        asked = questions_of(scene, f"ask {seed}", count=count, weights=weights)
        repeated = [asked[place % len(asked)] for place in range(count)]
        for place, (kind, question, answer) in enumerate(sorted(repeated, key=lambda x: len(x[1].split()))):
            line = encode(question, answer)
            ids[row, place, : len(line)] = line
            where[row, place] = len(line) - 2
            kinds[row, place] = KINDS.index(kind)
            about[row, place] = _about(scene, kind, question)
    return ids, where, kinds, about


class ThreadTuner:
    """Picks the faster number of CPU threads from time to time: on a busy machine one thread can be faster than two."""

    def __init__(self, *, every_seconds: float = 30, steps: int = 8) -> None:
        self.choices = sorted({1, torch.get_num_threads()})
        self.every, self.steps = every_seconds, steps
        self.trials: list[tuple[float, int]] = []
        self.left, self.since = 0, time.time() - every_seconds
        self.waiting: list[int] = []

    def step(self) -> None:
        """Is called before every training step."""
        now = time.time()
        if self.left > 0:
            self.left -= 1
            if self.left > 0:
                return
            self.trials.append((now - self.since, torch.get_num_threads()))
            if not self.waiting:
                torch.set_num_threads(min(self.trials)[1])
                self.since = now
                return
        elif now - self.since < self.every or len(self.choices) == 1:
            return
        else:
            self.trials, self.waiting = [], list(self.choices)
        torch.set_num_threads(self.waiting.pop())
        self.left, self.since = self.steps, now


@torch.no_grad()
def make_lessons(
    model: LlavaNextForConditionalGeneration,
    groups: list[Group],
    *,
    questions: int,
    weights: list[float] | None = None,
) -> list[Lesson]:
    """Runs the frozen vision tower once over all pictures and tokenises their questions."""
    lessons, tuner = [], ThreadTuner(every_seconds=10, steps=2)
    for group in groups:
        kept = list(range(len(group.seeds)))
        parts = []
        for i in range(0, len(kept), 64):
            tuner.step()
            tiles = torch.from_numpy(group.tiles[kept[i : i + 64]]).to(model.device)
            parts.append(tile_features(model, tiles).half().cpu())
        order = torch.tensor(group.layout.order)
        labels = torch.from_numpy(group.labels).long()
        labels = torch.cat([labels, torch.zeros_like(labels[:, :1])], 1)
        labels = labels[:, torch.where(order < 0, labels.shape[1] - 1, order)].to(torch.int8)
        lessons.append(Lesson(group, torch.cat(parts), labels, *_question_arrays(group, questions, weights)))
    return lessons


def opening_ids(text: str) -> list[int]:
    """Returns token ids of the text before the picture."""
    return [TOKEN_ID[word] for word in (*text.split(), "user:")]


def make_prefix(
    model: LlavaNextForConditionalGeneration, lesson: Lesson, rows: np.ndarray, opening: list[int]
) -> Tensor:
    """Returns embeddings `[B, P, D]` of the opening text and the visual tokens."""
    features = lesson.features[rows].to(model.device).float()
    visual = pack(model, features, lesson.group.layout)
    ids = torch.tensor(opening, device=model.device)
    text = model.model.language_model.embed_tokens(ids).expand(len(rows), -1, -1)
    return torch.cat([text, visual], 1)


def choose_kept(labels: Tensor, opening: int, keep: int, *, bonus: float, center_bonus: float) -> Tensor:
    """Returns sorted prefix rows `[B, opening + keep]`: random visual tokens, object patches preferred by a bonus."""
    score = torch.rand(labels.shape[:2]) + bonus * (labels[..., 0] > 0) + center_bonus * labels[..., 4]
    picked = score.topk(min(keep, labels.shape[1]), dim=1).indices.sort(1).values + opening
    text = torch.arange(opening).expand(len(labels), -1)
    return torch.cat([text, picked], 1)


@dataclass
class Recipe:
    """One phase of decoder training."""

    seconds: float
    rate: float
    batch: int = 8
    questions: int = 16
    final_rate: float = 1.0
    full_share: float = 0.15
    full_share_end: float = 0.15
    deep: float = 0.4
    guide: float = 0.4
    drop_layers: tuple[int, ...] = (1, 1, 1, 2, 3)
    keep: tuple[int, ...] = (24, 32, 48, 64, 80)
    place: float = 0.1


def _make_drops(
    rng: random.Random, recipe: Recipe, labels: Tensor, opening: int, num_layers: int
) -> list[Drop]:
    """Returns one drop, sometimes a second one deeper."""
    bonus, center = rng.choice((1.0, 1.0, 0.5, 0.3)), rng.choice((0.0, 1.0, 1.0))
    layer, keep = rng.choice(recipe.drop_layers), rng.choice(recipe.keep)
    device_keep = choose_kept(labels, opening, keep, bonus=bonus, center_bonus=center)
    drops = [Drop(layer, device_keep)]
    if num_layers > 4 and rng.random() < 0.4:
        kept = labels.gather(
            1, (device_keep[:, opening:] - opening)[..., None].expand(-1, -1, labels.shape[-1])
        )
        half = max(10, kept.shape[1] // 2)
        again = choose_kept(kept, opening, half, bonus=1.0, center_bonus=1.0)
        drops.append(Drop(rng.randint(layer + 1, num_layers - 1), again))
    return drops


def answer_losses(
    model: LlavaNextForConditionalGeneration, states: list[Tensor], ids: Tensor, where: Tensor, *, deep: float, with_eos: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the weighted loss (final layer plus deep supervision) and the share of right answers."""
    answer = ids.gather(2, where[..., None] + 1)[..., 0]
    weights = [deep / max(1, len(states) - 2)] * (len(states) - 1) + [1.0]
    weights[0] = 0.0
    total = torch.zeros((), device=ids.device)
    at = where[..., None, None].expand(-1, -1, 1, states[0].shape[-1])
    for weight, state in zip(weights, states):
        if weight == 0.0:
            continue
        logits = head_logits(model, state.gather(2, at)[:, :, 0])
        total = total + weight * F.cross_entropy(logits.flatten(0, 1), answer.flatten())
    right = (logits.argmax(-1) == answer).float().mean()
    if with_eos:
        end = head_logits(model, states[-1].gather(2, at + 1)[:, :, 0]).flatten(0, 1)
        total = total + 0.3 * F.cross_entropy(end, torch.full((len(end),), EOS, device=ids.device))
    return total, right


class Aid(Protocol):
    """A training aid: what else the first layers' visual tokens are asked."""

    def loss(self, prefixes: list[Tensor], labels: Tensor, opening: int) -> Tensor:
        """Returns a loss on the states `[B, P, D]` of the prefix after each layer."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Returns its own weights."""


class PlaceReader(nn.Module):
    """Training aid: asks every visual token, after the first layers, where in the picture it is and if it is base."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.place = nn.ModuleList(nn.Linear(width, len(PLACES)) for _ in range(2))
        self.base = nn.ModuleList(nn.Linear(width, 1) for _ in range(2))

    def loss(self, prefixes: list[Tensor], labels: Tensor, opening: int) -> Tensor:
        """Returns the loss after layers 0 and 1, as long as no token was dropped."""
        count = labels.shape[1]
        is_base = (torch.arange(count, device=labels.device) < 36).float().expand(len(labels), -1)
        there = labels[..., 0] > 0
        total = torch.zeros((), device=labels.device)
        for index in range(2):
            hidden = prefixes[index]
            if hidden.shape[1] != opening + count:
                break
            visual = hidden[:, opening:]
            total = total + F.cross_entropy(self.place[index](visual[there]), labels[..., 3][there].long())
            total = total + F.binary_cross_entropy_with_logits(self.base[index](visual)[..., 0], is_base)
        return total


def train_language(
    model: LlavaNextForConditionalGeneration, lessons: list[Lesson], aid: Aid, recipe: Recipe, *,
    seed: int, name: str, validation: list[Lesson],
    save: Callable[[LlavaNextForConditionalGeneration], None] | None = None, report_seconds: float = 150,
    kinds: tuple[str, ...] = KINDS,
) -> None:  # fmt: skip
    """Trains the decoder, the embeddings, the head and the newline embedding in place for a wall-clock time."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    torch.manual_seed(seed)
    weights = [*model.model.language_model.parameters(), model.lm_head.weight, model.model.image_newline]
    weights += list(aid.parameters())
    decay = [w for w in weights if w.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.03}, {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0}],
        lr=recipe.rate, betas=(0.9, 0.98),
    )  # fmt: skip
    shares = np.array([len(x.ids) for x in lessons], float)
    shares /= shares.sum()
    start, step, seen, mean, reported = time.time(), 0, 0, [3.0, 0.1], 0.0
    num_layers = len(model.model.language_model.layers)
    tuner = ThreadTuner()
    while (spent := time.time() - start) < recipe.seconds:
        tuner.step()
        used = spent / recipe.seconds
        ease = 1.0 if used < 0.3 else 1.0 - (used - 0.3) / 0.7
        lr = recipe.rate * min(1, (step + 1) / 150) * (recipe.final_rate + (1 - recipe.final_rate) * ease)
        for part in optimizer.param_groups:
            part["lr"] = lr
        loss, right = _step_loss(
            model, lessons[numbers.choice(len(lessons), p=shares)], aid, recipe, rng, numbers, used
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step, seen = step + 1, seen + recipe.batch
        mean = [0.99 * mean[0] + 0.01 * loss.item(), 0.99 * mean[1] + 0.01 * right.item()]
        if step % 200 == 0:
            print(f"{name} L{num_layers} step {step} {spent:.0f}s {seen / (time.time() - start):.0f} img/s "
                  f"loss {mean[0]:.3f} right {100 * mean[1]:.1f} threads {torch.get_num_threads()}", flush=True)  # fmt: skip
        if spent - reported > report_seconds:
            reported = spent
            print(name, "validation", evaluate(model, validation, limit=96, kinds=kinds), flush=True)
            if save:
                save(model)
    print(name, "end", evaluate(model, validation, kinds=kinds), flush=True)


GUIDED = (1, 2, 3)


def guidance_loss(watch: Watch, drops: list[Drop], things: Tensor, about: Tensor, where: Tensor) -> Tensor:
    """Returns a loss that is smaller the more the watched heads attend to the objects of a question, from its last two rows.

    Args:
        watch: collected attention.
        drops: what was dropped, in order.
        things: number of the object under every prefix row `[B, P]`, 0 for none.
        about: objects asked about `[B, Q]`, one bit each.
        where: row of `assistant:` `[B, Q]`.
    """
    total = torch.zeros((), device=where.device)
    for layer, weights in zip(watch.layers, watch.seen):
        under = things
        for drop in drops:
            if drop.layer <= layer:
                under = under.gather(1, drop.keep)
        wanted = ((about[..., None] >> (under[:, None] - 1).clamp(min=0)) & 1).bool() & (under[:, None] > 0)
        some = wanted.any(-1)
        for back in (0, 1):
            at = (where - back)[:, None, :, None, None].expand(-1, weights.shape[1], -1, 1, weights.shape[-1])
            mass = (weights.gather(3, at)[:, :, :, 0] * wanted[:, None]).sum(-1)
            total = total - (mass + 1e-4).log().mean(1)[some].mean()
    return total / (2 * len(watch.layers))


def _step_loss(
    model: LlavaNextForConditionalGeneration, lesson: Lesson, aid: Aid, recipe: Recipe, rng: random.Random,
    numbers: np.random.Generator, used: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns loss and share of right answers of one random batch."""
    rows = numbers.integers(0, len(lesson.ids), recipe.batch)
    first = numbers.integers(0, max(1, lesson.ids.shape[1] - recipe.questions + 1))
    picks = np.arange(lesson.ids.shape[1])[first : first + recipe.questions]
    with_eos = rng.random() < 0.25
    where = torch.from_numpy(lesson.where[rows][:, picks])
    width = int(where.max()) + (2 if with_eos else 1)
    every = torch.from_numpy(lesson.ids[rows][:, picks])
    opening = opening_ids(rng.choice(OPENINGS) if rng.random() < 0.5 else "")
    labels = lesson.labels[rows]
    prefix = make_prefix(model, lesson, rows, opening)
    num_layers = len(model.model.language_model.layers)
    full_share = recipe.full_share + (recipe.full_share_end - recipe.full_share) * used
    drops = []
    if rng.random() >= full_share:
        drops = _make_drops(rng, recipe, labels, len(opening), num_layers)
        drops = [Drop(d.layer, d.keep.to(model.device)) for d in drops]
    every, where, labels = every.to(model.device), where.to(model.device), labels.to(model.device)
    watch = Watch(GUIDED[: num_layers - 1], 2, []) if recipe.guide else None
    states, prefixes = decode(model, prefix, every[..., :width], drops=drops, watch=watch)
    loss, right = answer_losses(model, states, every, where, deep=recipe.deep, with_eos=with_eos)
    if watch:
        things = F.pad(labels[..., 5].long(), (len(opening), 0))
        about = torch.from_numpy(lesson.about[rows][:, picks]).to(model.device)
        guide = recipe.guide * guidance_loss(watch, drops, things, about, where)
        loss = loss + guide * min(1.0, 2 * (1 - used))
    if recipe.place:
        loss = loss + recipe.place * aid.loss(prefixes, labels, len(opening))
    return loss, right


@torch.no_grad()
def evaluate(
    model: LlavaNextForConditionalGeneration, lessons: Sequence[Lesson], *, limit: int | None = None, other: bool = False,
    base_only: bool = False, layers: Sequence[int] = (), batch: int = 16, kinds: tuple[str, ...] = KINDS,
) -> dict[str, float]:  # fmt: skip
    """Returns exact-match percentages (answer and end token) by kind, over all kinds equally, and by early layer.

    Args:
        model: the model.
        lessons: pictures and questions.
        limit: pictures of the largest group used; smaller groups in proportion.
        other: shows each question the next picture instead of its own.
        base_only: shows the base tile only.
        layers: early layers whose lens accuracy is reported too.
        batch: pictures per step.
        kinds: the kinds that the lessons number; those that were not asked count for nothing.
    """
    right, seen = np.zeros((1 + len(layers), len(kinds))), np.zeros(len(kinds))
    share = 1.0 if limit is None else min(1.0, limit / max(len(x.ids) for x in lessons))
    for lesson in lessons:
        for first in range(0, max(2, round(share * len(lesson.ids))), batch):
            rows = np.arange(first, min(first + batch, len(lesson.ids)))
            shown = (rows + 1) % len(lesson.ids) if other else rows
            prefix = make_prefix(model, lesson, shown, opening_ids(""))
            prefix = prefix[:, :37] if base_only else prefix
            ids, where = (torch.from_numpy(x[rows]).to(model.device) for x in (lesson.ids, lesson.where))
            states, _ = decode(model, prefix, ids)
            at = where[..., None, None].expand(-1, -1, 1, prefix.shape[-1])
            answer = ids.gather(2, where[..., None] + 1)[..., 0]
            ended = head_logits(model, states[-1].gather(2, at + 1)[:, :, 0]).argmax(-1) == EOS
            for slot, layer in enumerate((len(states) - 1, *layers)):
                ok = head_logits(model, states[layer].gather(2, at)[:, :, 0]).argmax(-1) == answer
                ok = (ok & ended if slot == 0 else ok).cpu().numpy()
                right[slot] += np.bincount(lesson.kind[rows].ravel(), ok.ravel(), len(kinds))
            seen += np.bincount(lesson.kind[rows].ravel(), minlength=len(kinds))
    some = seen > 0
    right, seen, kinds = right[:, some], seen[some], tuple(kind for kind, there in zip(kinds, some) if there)
    result = {"all": float((right[0] / seen).mean()), "mixed": float(right[0].sum() / seen.sum())}
    result |= {kind: float(right[0, i] / seen[i]) for i, kind in enumerate(kinds)}
    result |= {f"layer {layer}": float((right[1 + i] / seen).mean()) for i, layer in enumerate(layers)}
    return {key: round(100 * value, 1) for key, value in result.items()} | {"n": int(seen.sum())}
