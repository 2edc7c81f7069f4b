"""The programs in examples/: each runs, and does what it says, with the demo model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chatglm
from chatglm.serving.chat_engine import ChatEngine
from chatglm.tools import load_tools
from live_server import NAME, Live, serve

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serve(ChatEngine(*chatglm.load())) as server:
        yield server


def run(name: str, live: Live) -> str:
    environment = os.environ | {
        "OPENAI_BASE_URL": f"{live.url}/v1", "MODEL": NAME, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1",
        "LANGSMITH_TRACING": "false",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loop_over_the_api(live: Live) -> None:
    said = run("openai_tools.py", live)
    assert "[get_weather {'city': 'Paris'}]" in said and '[{"temperature": 12, "weather": "sunny"}]' in said
    assert "12" in said.splitlines()[-1]


def test_an_agent_of_langchain(live: Live) -> None:
    pytest.importorskip("langchain_openai", reason="the example needs LangChain")
    pytest.importorskip("langchain", reason="the example needs LangChain")
    called, answer = run("langchain_agent.py", live).splitlines()[:2]
    assert called == "get_weather {'city': 'Paris'}" and "12" in answer


def test_a_file_of_tools() -> None:
    tools = load_tools(ROOT / "examples" / "my_tools.py")
    assert sorted(tools) == ["calculate", "convert_units", "get_weather", "write_note"]
    assert tools["write_note"].confirm and tools["get_weather"](city="Bern")["city"] == "Bern"


def test_an_mcp_server() -> None:
    pytest.importorskip("mcp", reason="the example needs the library mcp")
    from chatglm.tools import Call, run_call
    from chatglm.tools.mcp_servers import MCPServers, read_config

    config = read_config(ROOT / "examples" / "mcp.json")
    config["weather"] |= {"command": sys.executable, "cwd": str(ROOT)}
    with MCPServers(config) as servers:
        tool = servers.tools["get_weather"]
        assert tool.confirm and tool.description == "Get the current weather of a city"
        seen = run_call(servers.tools, Call("get_weather", {"city": "Paris"}))
        assert json.loads(seen.content) == {"city": "Paris", "temperature": 12, "weather": "sunny"}
        assert run_call(servers.tools, Call("get_weather", {"town": "x"})).content.startswith(
            "Error: wrong arguments: arguments: 'city' is a required property"
        )
