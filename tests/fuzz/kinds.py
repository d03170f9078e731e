"""The kinds of inputs. Each takes a seed's random numbers and the subject, runs one input, and returns how it ended."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from tests.fuzz import checkpoints, images, prompts, requests_, templates, tokenizers_
from tests.fuzz.commands import run_command
from tests.fuzz.subject import Outcome, Subject, judged
from tests.fuzz.values import damaged, mutated
from trio_edge.runtime.bundle.checks import manifest_from_json
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.devices.host import HostDevice
from trio_edge.runtime.devices.memory import check_memory
from trio_edge.runtime.images.interface import image_processing

if TYPE_CHECKING:
    import random
    from collections.abc import Callable


def manifest(rng: random.Random, subject: Subject) -> Outcome:
    """A changed manifest, read, checked and laid out in memory without loading a graph."""
    text = _manifest_text(rng, subject)

    def read() -> str:
        found = manifest_from_json(text, where="trio.json")
        image_processing(found.image_processing, encoder_keep=found.encoder_keep)
        check_memory(HostDevice(), found, found.graphs, weight_bytes=0)
        return "ok"

    return judged(read)


def _manifest_text(rng: random.Random, subject: Subject) -> bytes:
    if rng.random() < 0.1:
        return damaged(rng, subject.manifest_text)
    changed = mutated(rng, subject.manifest, subject.manifest_places)
    return json.dumps(changed).encode("utf-8", "surrogatepass")


def bundle(rng: random.Random, subject: Subject) -> Outcome:
    """A bundle with a changed manifest, or another file changed and its hash made right again, loaded and asked."""
    copy = subject.copy()
    name = rng.choice(
        [entry["path"] for entry in subject.manifest["files"] if "weights" not in entry["path"]]
    )
    if rng.random() < 0.6:
        subject.replace(copy / "trio.json", _manifest_text(rng, subject))
    else:
        subject.seal(copy, name, damaged(rng, (subject.bundle / name).read_bytes()))
    return judged(lambda: subject.compared(copy))


def files(rng: random.Random, subject: Subject) -> Outcome:
    """A bundle in which a file is a pipe, a device, a link, a folder, empty, cut short or missing."""
    copy = subject.copy()
    names = ["trio.json"] * 10 + [entry["path"] for entry in subject.manifest["files"]]
    path = copy / rng.choice(names)
    content = path.read_bytes() if path.stat().st_size < 1 << 20 else b"x"
    path.unlink()
    kind = rng.randrange(9)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(
            rng.choice(("/dev/zero", "/dev/random", "/dev/stdin", "/etc/passwd", "/proc/self/mem"))
        )
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == 5:
        path.symlink_to(subject.bundle / path.relative_to(copy))
    elif kind == 6:
        with path.open("wb") as file:
            file.truncate(1 << 42)
    elif kind == 7:
        (copy / "a").symlink_to("b")
        (copy / "b").symlink_to("a")
        path.symlink_to("a")
    return judged(lambda: "ok" if open_bundle(copy) else "")


KINDS: dict[str, tuple[int, Callable[[random.Random, Subject], Outcome]]] = {
    "manifest": (230, manifest),
    "template": (160, templates.template),
    "tokenizer": (160, tokenizers_.tokenizer),
    "image": (130, images.image),
    "video": (80, images.video),
    "request": (80, requests_.request),
    "prompt": (50, prompts.prompt),
    "stream": (20, prompts.stream),
    "file": (50, files),
    "command": (20, run_command),
    "checkpoint": (10, checkpoints.changed_checkpoint),
    "bundle": (10, bundle),
}
"""Share of all inputs in thousandths, and what runs one."""
