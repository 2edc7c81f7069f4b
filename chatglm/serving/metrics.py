"""Counts and times in the text format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        place = next((i for i, bound in enumerate(SECONDS) if seconds <= bound), len(SECONDS))
        self._counts[place] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        total = 0
        for bound, count in zip((*SECONDS, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counts of the HTTP server; the engine's own counts are added when they are read."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        self.first_token = Histogram()
        self.answer = Histogram()

    def text(self, engine: Engine | None) -> str:
        lines = ["# TYPE chatglm_http_responses_total counter"]
        lines += [
            f'chatglm_http_responses_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.responses.items())
        ]
        for name, histogram in (("time_to_first_token", self.first_token), ("answer", self.answer)):
            lines.append(f"# TYPE chatglm_{name}_seconds histogram")
            lines += histogram.lines(f"chatglm_{name}_seconds")
        if engine is not None:
            seen = engine.statistics
            held, size = engine.cached
            for name, value in (
                ("requests", seen.requests),
                ("requests_refused", seen.refused),
                ("requests_preempted", seen.preempted),
                ("prompt_tokens", seen.prompt_tokens),
                ("prompt_tokens_cached", seen.cached_tokens),
                ("completion_tokens", seen.completion_tokens),
                ("steps", seen.steps),
            ):
                lines += [f"# TYPE chatglm_{name}_total counter", f"chatglm_{name}_total {value}"]
            lines.append("# TYPE chatglm_requests_finished_total counter")
            for reason, count in sorted(seen.finished.copy().items()):
                lines.append(f'chatglm_requests_finished_total{{reason="{reason}"}} {count}')
            for name, value in (
                ("requests_running", engine.running),
                ("requests_waiting", engine.waiting),
                ("cache_tokens", held),
                ("cache_tokens_limit", engine.cache_tokens),
                ("cache_bytes", size),
            ):
                lines += [f"# TYPE chatglm_{name} gauge", f"chatglm_{name} {value}"]
        return "\n".join(lines) + "\n"
