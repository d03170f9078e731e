"""The fuzzed bundle, opened once in a process, its answer, and the rule for a clear message."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import traceback
import unicodedata
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from tests.fuzz.values import places
from trio_edge.runtime.bundle.errors import TrioEdgeError
from trio_edge.runtime.bundle.reader import sha256_of
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

QUESTION = "what is this?"


class Outcome(NamedTuple):
    """The end of one input."""

    kind: str
    """"clear": one line. "same": the answer of the unchanged bundle. "ok": an answer, or nothing to compare. "different":
    another answer, which a changed setting may give. "broken": anything else."""
    text: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether it is a finding."""
        return self.kind == "broken"


def judged(action: Callable[[], str]) -> Outcome:
    """Run an input and return how it ended; ``action`` returns the kind of a good end."""
    try:
        return Outcome(action())
    except TrioEdgeError as error:
        line = str(error)
        return (
            Outcome("clear", line[:200]) if is_clear(line) else Outcome("broken", f"unclear: {line!r:.300}")
        )
    except Exception as error:
        where = traceback.format_exception(error)[-3:]
        return Outcome("broken", f"{type(error).__name__}: {' '.join(''.join(where).split())[:600]}")


def is_clear(line: str) -> bool:
    """Return whether a message is one line, not too long, that a terminal may show."""
    odd = any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in line)
    return bool(line) and not odd and len(line) < 3000 and "Traceback" not in line


@dataclass
class Subject:
    """The bundle and everything that is made of it once."""

    bundle: Path
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="trio-fuzz-")))
    """For files of inputs; empty between inputs."""
    open_things: ExitStack = field(default_factory=ExitStack)
    """Closed with the subject."""

    def __post_init__(self) -> None:
        self.manifest_text = (self.bundle / "trio.json").read_bytes()
        self.manifest: dict[str, Any] = json.loads(self.manifest_text)
        self.manifest_places = places(self.manifest)
        self.tokenizer = json.loads((self.bundle / "tokenizer.json").read_bytes())
        self.tokenizer_places = places(self.tokenizer)
        self.template = (self.bundle / "chat_template.jinja").read_text()
        self.image = Image.new("RGB", (60, 40), (200, 30, 30))
        self.pipeline = Pipeline.from_bundle(self.bundle, backend="onnxruntime", threads=1)
        self.answer = self.answer_of(self.pipeline)
        self.picture = self.folder.with_suffix(".png")
        self.image.save(self.picture)

    def answer_of(self, pipeline: Pipeline) -> list[int]:
        """Return the tokens that a pipeline answers with."""
        answer = pipeline.generate(self.image, QUESTION, max_new_tokens=2)
        assert isinstance(answer.text, str)
        return answer.token_ids

    def compared(self, bundle: Path) -> str:
        """Load a bundle, ask it, and return whether it answers as the unchanged one."""
        with Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1) as pipeline:
            return "same" if self.answer_of(pipeline) == self.answer else "different"

    def copy(self) -> Path:
        """Return a copy of the bundle; weights are links to the same files."""
        target = self.folder / "bundle"
        shutil.copytree(self.bundle, target, copy_function=os.link)
        return target

    def seal(
        self, bundle: Path, changed: str, content: bytes, manifest: dict[str, Any] | None = None
    ) -> None:
        """Change a file of a copy and make its hash in the manifest right again."""
        self.replace(bundle / changed, content)
        manifest = json.loads(self.manifest_text) if manifest is None else manifest
        for entry in manifest["files"]:
            if entry["path"] == changed:
                entry |= {"num_bytes": len(content), "sha256": sha256_of(bundle / changed)}
        self.replace(bundle / "trio.json", json.dumps(manifest).encode())

    def replace(self, path: Path, content: bytes) -> None:
        """Write a file of a copy without changing the bundle, which shares its content."""
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    def clean(self) -> None:
        """Delete what an input wrote."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)

    def close(self) -> None:
        """Delete everything."""
        self.open_things.close()
        self.pipeline.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.picture.unlink(missing_ok=True)
