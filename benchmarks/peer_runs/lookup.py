"""Several answers to text prompts, with or without prompt lookup, by one runtime.

Argument: a JSON object, see ``by_runtime`` in ``benchmarks/several_tokens.py``. Prints one line of JSON for each prompt: the
new tokens without the end token, the seconds from the first token to the end, and the draft tokens that were tried and right,
where the runtime tells them.
"""

import json
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from typing import Any

Answer = tuple[list[int], float, int | None, int | None]
"""Token ids, seconds, draft tokens tried, and right ones."""
Ask = Callable[[str, list[int]], Answer]


def ours(request: dict[str, Any]) -> Ask:
    """Return a function that asks trio-edge's runtime; ``lookup`` may be "auto"."""
    from trio_edge.runtime.pipeline import Pipeline

    pipeline = Pipeline.from_bundle(request["model"], backend="onnxruntime", threads=request["threads"])

    def ask(prompt: str, ids: list[int]) -> Answer:
        answer = pipeline.generate(
            None, prompt, max_new_tokens=request["new_tokens"], temperature=0.0, lookup=request["lookup"]
        )
        assert answer.text
        found = answer.statistics
        if found.text_tokens != len(ids):
            raise SystemExit(f"{found.text_tokens} prompt tokens, expected {len(ids)}")
        return answer.token_ids, found.decode_ms / 1e3, found.draft_tokens, found.accepted_tokens

    return ask


def openvino(request: dict[str, Any]) -> Ask:
    """Return a function that asks OpenVINO GenAI, which does not tell about drafts."""
    import numpy as np
    import openvino_genai
    from openvino import Tensor

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": request["threads"], **request["settings"]}
    config = {"max_new_tokens": request["new_tokens"], "do_sample": False}
    if request["lookup"]:
        settings["prompt_lookup"] = True
        config |= {"num_assistant_tokens": request["lookup"], "max_ngram_size": request["ngram"]}
    pipeline = openvino_genai.LLMPipeline(request["model"], "CPU", **settings)

    class FirstToken(openvino_genai.StreamerBase):
        """Notes the time of the first token."""

        def __init__(self) -> None:
            super().__init__()
            self.time = 0.0

        def write(self, _tokens: int | list[int]) -> openvino_genai.StreamingStatus:
            self.time = self.time or time.perf_counter()
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def ask(_prompt: str, ids: list[int]) -> Answer:
        first = FirstToken()
        result = pipeline.generate(
            Tensor(np.array([ids])), openvino_genai.GenerationConfig(**config, eos_token_id=request["end"]), first
        )  # fmt: skip
        return list(result.tokens[0]), time.perf_counter() - first.time, None, None

    return ask


def genai(request: dict[str, Any]) -> Ask:
    """Return a function that asks onnxruntime-genai; ``lookup`` may be "auto"."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(request["model"])
    session = {"session_options": {"intra_op_num_threads": request["threads"]}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = onnxruntime_genai.Model(config)

    def ask(_prompt: str, ids: list[int]) -> Answer:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + request["new_tokens"], do_sample=False)
        if lookup := request["lookup"]:
            width = {"min_adaptive_k": 2} if lookup == "auto" else {"max_draft_tokens": lookup}
            parameters.set_speculative_options(ngram_size=request["ngram"], **width)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids)
        generator.generate_next_token()
        start = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        seconds = time.perf_counter() - start
        found = generator.get_speculative_stats() if request["lookup"] else {}
        drafts = found.get("draft_tokens_proposed"), found.get("draft_tokens_accepted")
        return [int(one) for one in generator.get_sequence(0)[len(ids) :]], seconds, *drafts

    return ask


def main() -> None:
    """Answer all prompts; the first one twice, to warm up."""
    request = json.loads(sys.argv[1])
    ask = {"ours": ours, "openvino": openvino, "genai": genai}[request["runtime"]](request)
    for turn, (prompt, ids) in enumerate([request["prompts"][0], *request["prompts"]]):
        tokens, seconds, tried, right = ask(prompt, ids)
        kept = list(takewhile(lambda token: token != request["end"], tokens))
        found = {"tokens": kept, "seconds": seconds, "tried": tried, "right": right}
        if turn:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
