"""A bundle as the model ``trio_edge`` of lmms-eval, for its tasks such as GQA, POPE, MME and TextVQA.

    lmms-eval --model trio_edge --model_args pretrained=BUNDLE,threads=8 --tasks pope --batch_size 1

lmms-eval 0.7 and newer find it by this package's entry point in the group ``lmms_eval.models``. Only lmms-eval imports
this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from rich.console import Console
from rich.progress import track

from trio_edge.calibration.evaluate.answer_cost import image_tokens, processed_tokens
from trio_edge.runtime.bundle.errors import DataError, ShapeError
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "trio_edge"
_DEFAULT_NEW_TOKENS = 128


def manifest() -> ModelManifest:
    """Return the entry for lmms-eval's registry."""
    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.{TrioEdge.__name__}")


@final
class TrioEdge(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """A bundle that answers lmms-eval's requests one by one."""

    def __init__(
        self,
        pretrained: str,
        backend: str = "auto",
        threads: int | str = 0,
        batch_size: int | str = 1,
        **ignored: Any,
    ) -> None:
        """Open the bundle ``pretrained``. lmms-eval passes other settings, such as the device, to every model: ``ignored``.

        Raises:
            ShapeError: If the batch size is not 1.
        """
        super().__init__()  # lmms-eval 0.7 sets rank, task_dict and cache_hook there
        if int(batch_size) != 1:
            raise ShapeError(
                f"batch_size: expected 1, got {batch_size}; a bundle answers one question at a time"
            )
        self._pipeline = Pipeline.from_bundle(str(pretrained), backend=str(backend), threads=int(threads))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each request, greedily unless its task asks for a temperature."""
        answers, entered, processed = [], 0.0, 0.0
        console = Console(stderr=True)
        for request in track(requests, description=NAME, console=console, disable=self.rank != 0):
            context, settings, doc_to_visual, doc_id, task, split = request.args
            images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            generation = self._pipeline.generate(
                _images(images), context, **_generation_settings(settings, self._pipeline)
            )
            answers.append(_cut(generation.text, settings.get("until") or []))
            self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
            counts = image_tokens(self._pipeline.images, generation.images)
            entered += sum(counts)
            processed += processed_tokens(
                self._pipeline.manifest, image_tokens=counts, kept=generation.statistics.kept_tokens
            )
        count = max(len(answers), 1)
        console.print(f"visual tokens: {entered / count:.1f} in, {processed / count:.1f} kept on average")
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise DataError: it needs the logits of all rows of an answer, and a bundle returns only the last row's."""
        raise _other_task("loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise DataError: later rounds continue earlier ones, and a bundle answers one round."""
        raise _other_task("generate_until_multi_round")


def _other_task(kind: str) -> DataError:
    return DataError(f"{NAME}: expected a task of type generate_until, got {kind}; choose another task")


def _images(images: Sequence[Any]) -> list[Image.Image]:
    if not all(isinstance(image, Image.Image) for image in images):
        kinds = ", ".join(type(image).__name__ for image in images)
        raise ShapeError(f"task: expected images only in a question, got {kinds}; choose another task")
    return list(images)


def _generation_settings(settings: dict[str, Any], pipeline: Pipeline) -> dict[str, Any]:
    """Return ``Pipeline.generate``'s arguments for a task's ``generation_kwargs``."""
    wanted = int(settings.get("max_new_tokens") or _DEFAULT_NEW_TOKENS)
    sampled = bool(settings.get("do_sample", True)) and float(settings.get("temperature") or 0.0) > 0.0
    top_p = float(settings.get("top_p") or 1.0)
    return {
        "max_new_tokens": min(wanted, pipeline.manifest.max_new_tokens),
        "temperature": float(settings["temperature"]) if sampled else 0.0,
        "top_p": top_p if sampled else 1.0,
        "seed": 0,
    }


def _cut(text: str, until: str | Sequence[str]) -> str:
    """Return the text up to the first of the stop texts."""
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text.strip()
