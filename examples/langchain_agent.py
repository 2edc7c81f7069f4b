"""A LangChain agent on `python api.py`. Needs `pip install langchain langchain-openai`."""

import os

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city"""
    return '{"temperature": 12, "weather": "sunny"}'


base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
model = ChatOpenAI(base_url=base_url, api_key="none", model=os.environ.get("MODEL", "chatglm3-demo"), temperature=0)

# The model with tools, by itself: its answer holds the call.
call = model.bind_tools([get_weather]).invoke("What is the weather in Paris?").tool_calls[0]
print(call["name"], call["args"])

# An agent runs the call, and asks again.
agent = create_agent(model, [get_weather])
answer = agent.invoke({"messages": [{"role": "user", "content": "What is the weather in Paris?"}]})
print(answer["messages"][-1].content)
