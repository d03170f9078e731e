"""Prometheus metrics of a server, one registry for each app. prometheus-client is Prometheus' own library."""

from __future__ import annotations

from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@final
class Metrics:
    """Counts requests, tokens and times. It is thread-safe."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("trio_requests", "Requests by HTTP status", "status")
        self._cancelled = self._counter("trio_cancelled_answers", "Answers whose client went away")
        self._prompt = self._counter("trio_prompt_tokens", "Prompt tokens before reduction")
        self._visual = self._counter("trio_visual_tokens", "Visual tokens before reduction")
        self._kept = self._counter("trio_kept_tokens", "Visual tokens that each stage kept", "stage")
        self._levels = self._counter("trio_level_answers", "Answers by the level that gave them", "level")
        self._lowered = self._counter(
            "trio_lowered_requests", "Requests at the lowest level because others wait"
        )
        self._new = self._counter("trio_completion_tokens", "Tokens of answers")
        self._steps = self._counter("trio_decode_steps", "Decode steps, each of which gives a token or more")
        self._decisions = self._counter(
            "trio_decisions", "Requests whose questions were answered without decoding"
        )
        self._questions = self._counter("trio_questions", "Questions of these requests")
        self._waiting = self._gauge("trio_waiting_requests", "Requests that wait")
        self._running = self._gauge("trio_running_requests", "Answers that run")
        self._replicas = self._gauge("trio_replicas", "Replicas that run")
        self._queue = self._seconds("trio_queue_seconds", "Wait before an answer starts")
        self._ttft = self._seconds("trio_first_token_seconds", "From an answer's start to its first token")
        self._decode = self._seconds("trio_decode_seconds", "All tokens of an answer after the first")
        self._deciding = self._seconds("trio_decision_seconds", "All questions of a request")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model", *labels), registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("model",), registry=self._registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("model",), buckets=_SECONDS, registry=self._registry)

    def count_request(self, model: str, status: int) -> None:
        """Count an answered or refused request by its HTTP status."""
        self._requests.labels(model, str(status)).inc()

    def set_load(self, model: str, *, waiting: int, running: int) -> None:
        """Set the current numbers of waiting and running requests."""
        self._waiting.labels(model).set(waiting)
        self._running.labels(model).set(running)

    def set_replicas(self, model: str, count: int) -> None:
        """Set the current number of replicas."""
        self._replicas.labels(model).set(count)

    def count_lowered(self, model: str) -> None:
        """Count a request that runs at the lowest level because others wait."""
        self._lowered.labels(model).inc()

    def count_answer(self, model: str, usage: dict[str, Any], *, is_cancelled: bool) -> None:
        """Count a finished or cancelled answer, whose ``usage`` has OpenAI's fields and our own."""
        self._queue.labels(model).observe(usage["queue_ms"] / 1e3)
        if is_cancelled:
            self._cancelled.labels(model).inc()
        if not usage["completion_tokens"]:
            return
        self._prompt.labels(model).inc(usage["prompt_tokens"])
        self._visual.labels(model).inc(usage["visual_tokens"])
        for stage, kept in enumerate(usage["kept_tokens"], 1):
            self._kept.labels(model, str(stage)).inc(kept)
        if level := usage.get("level"):
            for name, count in usage.get("levels", {level: 1}).items():
                self._levels.labels(model, name).inc(count)
        if questions := usage.get("questions"):
            self._decisions.labels(model).inc()
            self._questions.labels(model).inc(questions)
            self._deciding.labels(model).observe((usage["ttft_ms"] + usage["decode_ms"]) / 1e3)
            return
        self._new.labels(model).inc(usage["completion_tokens"])
        self._steps.labels(model).inc(usage["decode_steps"])
        self._ttft.labels(model).observe(usage["ttft_ms"] / 1e3)
        self._decode.labels(model).observe(usage["decode_ms"] / 1e3)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
