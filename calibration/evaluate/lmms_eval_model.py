"""A bundle as the model ``trio_edge`` of lmms-eval, for its tasks such as GQA, POPE, MME and TextVQA.

    lmms-eval --model trio_edge --model_args pretrained=BUNDLE,threads=8 --tasks pope --batch_size 1

lmms-eval 0.7 and newer find it by this package's entry point in the group ``lmms_eval.models``. Only lmms-eval imports
this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from rich.console import Console
from rich.progress import track

from trio_edge.calibration.evaluate.answer_cost import answer_flops, image_tokens, processed_tokens
from trio_edge.runtime.bundle.errors import DataError, ShapeError
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.chat import build_messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.engines.cpu import CpuAccuracy

NAME = "trio_edge"
TIMES = ("first_tokens_s", "total_s")
"""Costs that are summed over all answers; the others are means."""
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
        cpu_accuracy: CpuAccuracy = "auto",
        batch_size: int | str = 1,
        system: str = "",
        num_frames: int | str = 0,
        report: str = "",
        **ignored: Any,
    ) -> None:
        """Open the bundle ``pretrained``. lmms-eval passes other settings, such as the device, to every model: ``ignored``.

        ``system`` is a system prompt, which may stand in double quotes. ``num_frames`` are sampled from each video, by default
        as many as the checkpoint's processor takes. The costs of all answers are written to the file ``report``.

        Raises:
            ShapeError: If the batch size is not 1.
        """
        super().__init__()  # lmms-eval 0.7 sets rank, task_dict and cache_hook there
        if int(batch_size) != 1:
            raise ShapeError(
                f"batch_size: expected 1, got {batch_size}; a bundle answers one question at a time"
            )
        self._pipeline = Pipeline.from_bundle(
            str(pretrained), backend=str(backend), threads=int(threads), cpu_accuracy=cpu_accuracy
        )
        self._system, self._num_frames = str(system).strip('"') or None, int(num_frames) or None
        self._report = str(report)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each request, greedily unless its task asks for a temperature."""
        answers, costs, console = [], list[dict[str, float]](), Console(stderr=True)
        for request in track(requests, description=NAME, console=console, disable=self.rank != 0):
            context, settings, doc_to_visual, doc_id, task, split = request.args
            shown = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            videos = [{"video": one, "num_frames": self._num_frames} for one in shown if isinstance(one, str)]
            images = _images(shown, but=videos)
            messages = build_messages(context, images=images, videos=videos, system=self._system)
            generation = self._pipeline.chat(messages, **_generation_settings(settings, self._pipeline))
            answers.append(_cut(generation.text, settings.get("until") or []))
            self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
            costs.append(self._costs(generation, is_video=bool(videos)))
        whole = {name: sum(one[name] for one in costs) for name in costs[0]} if costs else {}
        found = {name: cost if name in TIMES else cost / len(costs) for name, cost in whole.items()}
        if self._report:
            Path(self._report).write_text(json.dumps({"answers": len(costs), **found}))
        if found:
            text = "visual tokens: {visual_tokens:.1f} in, {processed_tokens:.1f} kept on average"
            console.print(text.format(**found))
        return answers

    def _costs(self, generation: Generation, *, is_video: bool) -> dict[str, float]:
        """Return the costs of an answer."""
        statistics, level = generation.statistics, self._pipeline.level_named(generation.statistics.level)
        counts = image_tokens(level, generation.images, is_video=is_video)
        processed = processed_tokens(level.manifest, image_tokens=counts, kept=statistics.kept_tokens)
        return {
            "first_tokens_s": statistics.ttft_ms / 1e3,
            "total_s": (statistics.ttft_ms + statistics.decode_ms) / 1e3,
            "flops": answer_flops(self._pipeline, statistics, generation.images, is_video=is_video),
            "kv_bytes": statistics.kv_bytes,
            "visual_tokens": sum(counts),
            "processed_tokens": processed,
        }

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise DataError: it needs the logits of all rows of an answer, and a bundle returns only the last row's."""
        raise _other_task("loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise DataError: later rounds continue earlier ones, and a bundle answers one round."""
        raise _other_task("generate_until_multi_round")


def _other_task(kind: str) -> DataError:
    return DataError(f"{NAME}: expected a task of type generate_until, got {kind}; choose another task")


def _images(shown: Sequence[Any], *, but: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """Return the images among ``shown``; ``but`` are the videos among them, which tasks give as paths."""
    images = [one for one in shown if isinstance(one, Image.Image)]
    if len(images) + len(but) != len(shown):
        kinds = ", ".join(type(one).__name__ for one in shown)
        raise ShapeError(f"task: expected images and video files, got {kinds}; choose another task")
    return images


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
