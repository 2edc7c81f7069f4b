"""/metrics in the format of Prometheus, and the Grafana dashboard that shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from chatglm.serving import metrics
from chatglm.serving.metrics import Histogram, sample
from live_server import NAME, Parrot, serve
from scripted import SECONDS

DASHBOARD = Path(__file__).resolve().parents[1] / "docs" / "grafana.json"
LABEL = f'{{model_name="{NAME}"}}'


def test_every_metric_has_help_a_type_and_its_samples() -> None:
    engine = Parrot(3, max_batch=1)
    with serve(engine) as live:
        live.chat("x", max_tokens=3, temperature=0)
        live.chat(live.engine.say("a"))
        assert all(engine.ended[reason].wait(SECONDS) for reason in ("length", "stop"))
        text = live.http.get("/metrics").text
    engine.close()
    families: dict[str, str] = {}
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name, meaning = line[7:].split(" ", 1)
            assert name not in families and meaning.endswith(".")
            families[name] = ""
        elif line.startswith("# TYPE "):
            name, kind = line[7:].split(" ")
            assert families[name] == "" and kind in ("counter", "gauge", "histogram")
            families[name] = kind
        else:
            found = re.fullmatch(r'([a-z_:0-9]+)(\{(?:[a-z_]+="[^"]*",?)*\})? (\S+)', line)
            assert found, line
            owner = found[1] if found[1] in families else re.sub("_(bucket|sum|count)$", "", found[1])
            assert families[owner] and (families[owner] == "histogram") == (owner != found[1]), line
            values[line.rpartition(" ")[0]] = float(found[3])
    assert values[f"vllm:generation_tokens_total{LABEL}"] >= 4
    assert values[f"vllm:prompt_tokens_total{LABEL}"] == values[f"vllm:prefix_cache_queries_total{LABEL}"] > 0
    assert values[f'vllm:request_success_total{{model_name="{NAME}",finished_reason="stop"}}'] == 1
    assert values[f'vllm:request_success_total{{model_name="{NAME}",finished_reason="length"}}'] == 1
    assert values['chatglm_http_responses_total{path="/v1/chat/completions",status="200"}'] == 2
    counts = {"request_queue_time": 2, "time_to_first_token": 2, "e2e_request_latency": 2}
    counts["inter_token_latency"] = int(values[f"vllm:generation_tokens_total{LABEL}"]) - 2
    for name, count in counts.items():
        assert values[f"vllm:{name}_seconds_count{LABEL}"] == count
        assert values[f'vllm:{name}_seconds_bucket{{model_name="{NAME}",le="+Inf"}}'] == count
    waited = values[f"vllm:request_queue_time_seconds_sum{LABEL}"]
    assert 0 <= waited <= values[f"vllm:time_to_first_token_seconds_sum{LABEL}"]
    first, whole = (
        values[f"vllm:{name}_seconds_sum{LABEL}"] for name in ("time_to_first_token", "e2e_request_latency")
    )
    assert whole == pytest.approx(first + values[f"vllm:inter_token_latency_seconds_sum{LABEL}"], abs=1e-4)
    assert values[f"vllm:kv_cache_usage_perc{LABEL}"] == 0 < values[f"chatglm_cache_tokens{LABEL}"]


def test_buckets_count_upwards() -> None:
    histogram = Histogram()
    for seconds in (0.0001, 0.03, 0.03, 1e6):
        histogram.add(seconds)
    lines = list(histogram.lines("t", {}))
    counts = [int(line.split()[-1]) for line in lines[: len(metrics.SECONDS) + 1]]
    assert counts == sorted(counts) and (counts[0], counts[-2], counts[-1]) == (1, 3, 4)
    assert lines[-1] == "t_count 4" and lines[len(metrics.SECONDS)] == 't_bucket{le="+Inf"} 4'


def test_labels_are_escaped() -> None:
    assert sample("m", 1, {"a": 'x"\\\n'}) == 'm{a="x\\"\\\\\\n"} 1'


def test_the_dashboard_asks_only_for_what_there_is() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    engine = Parrot(3)
    with serve(engine) as live:
        text = live.http.get("/metrics").text
    engine.close()
    known = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked.append(board["templating"]["list"][1]["query"]["query"])
    names = {name for expression in asked for name in re.findall(r"(?:vllm:|chatglm_)\w+", expression)}
    assert len(names) >= 15
    for name in names:
        assert name in known or re.sub("_(bucket|sum|count)$", "", name) in known, name
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
