"""Counts and times in the text format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).

What means the same as in vLLM has vLLM's name (https://docs.vllm.ai/en/latest/usage/metrics/), so that its dashboards
and alerts work; the rest begins with `chatglm_`. `docs/grafana.json` is a dashboard of both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ..engine import Engine

#: Upper bounds of the histograms.
SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
#: Our reason for the end of an answer -> vLLM's.
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}


class Histogram:
    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        place = next((i for i, bound in enumerate(SECONDS) if seconds <= bound), len(SECONDS))
        self._counts[place] += 1
        self._sum += seconds

    def lines(self, name: str, labels: Mapping[str, str]) -> Iterable[str]:
        total = 0
        for bound, count in zip((*SECONDS, "+Inf"), self._counts, strict=True):
            total += count
            yield sample(f"{name}_bucket", total, {**labels, "le": str(bound)})
        yield sample(f"{name}_sum", round(self._sum, 6), labels)
        yield sample(f"{name}_count", total, labels)


def sample(name: str, value: float, labels: Mapping[str, str]) -> str:
    """One line of the format."""
    escaped = {key: text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for key, text in labels.items()}
    listed = ",".join(f'{key}="{text}"' for key, text in escaped.items())
    return f"{name}{{{listed}}} {value}" if listed else f"{name} {value}"


def family(kind: str, name: str, meaning: str, *samples: tuple[float, Mapping[str, str]]) -> list[str]:
    """The lines of a counter or gauge."""
    head = [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
    return [*head, *(sample(name, value, labels) for value, labels in samples)]


class Metrics:
    """Counts and times of the HTTP server; the engine's own counts are added when they are read.

    Args:
        model: the model's name, a label of everything that it computed.
    """

    def __init__(self, model: str = "chatglm") -> None:
        self._labels = {"model_name": model}
        self.responses: Counter[tuple[str, int]] = Counter()
        self.queue = Histogram()
        self.first_token = Histogram()
        self.between_tokens = Histogram()
        self.answer = Histogram()

    def text(self, engine: Engine | None) -> str:
        responses = [
            (count, {"path": path, "status": str(status)}) for (path, status), count in sorted(self.responses.items())
        ]
        lines = family("counter", "chatglm_http_responses_total", "HTTP responses by path and status.", *responses)
        for name, histogram, meaning in (
            ("request_queue_time", self.queue, "Seconds that requests waited before their prompts were read."),
            ("time_to_first_token", self.first_token, "Seconds from the arrival of a request to its first token."),
            ("inter_token_latency", self.between_tokens, "Seconds between two tokens of an answer."),
            ("e2e_request_latency", self.answer, "Seconds from the arrival of a request to the end of its answer."),
        ):
            name = f"vllm:{name}_seconds"
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} histogram", *histogram.lines(name, self._labels)]
        return "\n".join([*lines, *(self._of_engine(engine) if engine is not None else [])]) + "\n"

    def _of_engine(self, engine: Engine) -> list[str]:
        seen, labels = engine.statistics, self._labels
        held, size = engine.cached
        ends = seen.finished.copy()
        lines = []
        for name, value, meaning in (
            ("chatglm_requests", seen.requests, "Requests that the engine took."),
            ("chatglm_requests_refused", seen.refused, "Requests refused because the queue was full."),
            ("chatglm_steps", seen.steps, "Steps, each of which computes one token of every running answer."),
            ("vllm:num_preemptions", seen.preempted, "Requests sent back to the queue to make room for others."),
            ("vllm:prompt_tokens", seen.prompt_tokens, "Tokens of prompts, those found in the cache included."),
            ("vllm:generation_tokens", seen.completion_tokens, "Tokens of answers."),
            ("vllm:prefix_cache_queries", seen.prompt_tokens, "Tokens of prompts that were looked up in the cache."),
            ("vllm:prefix_cache_hits", seen.cached_tokens, "Tokens of prompts that the cache already held."),
        ):
            lines += family("counter", f"{name}_total", meaning, (value, labels))
        reasons = [(ends.get(ours, 0), labels | {"finished_reason": theirs}) for ours, theirs in REASONS.items()]
        lines += family("counter", "vllm:request_success_total", "Requests that ended, by reason.", *reasons)
        for name, number, meaning in (
            ("vllm:num_requests_running", engine.running, "Requests that are being answered."),
            ("vllm:num_requests_waiting", engine.waiting, "Requests in the queue."),
            ("vllm:kv_cache_usage_perc", engine.used, "Share of the KV cache that running requests use; 1 is all."),
            ("chatglm_cache_tokens", held, "Tokens in the KV cache, those of idle conversations included."),
            ("chatglm_cache_tokens_limit", engine.cache_tokens, "Tokens that the KV cache may hold."),
            ("chatglm_cache_bytes", size, "Size of the KV cache in bytes."),
        ):
            lines += family("gauge", name, meaning, (number, labels))
        return lines
