"""The tool loop over any server with OpenAI's API, such as `python api.py`. Needs `pip install openai`."""

import os

from openai import OpenAI

from chatglm.tools import Call, Done, Observation, Text, run_conversation, tool


@tool
def get_weather(city: str) -> dict:
    """Get the current weather of a city

    Args:
        city: The name of the city
    """
    return {"temperature": 12, "weather": "sunny"}


client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
for step in run_conversation(client, messages, [get_weather], temperature=0):
    if isinstance(step, Text):
        print(step.delta, end="", flush=True)
    elif isinstance(step, Call):
        print(f"[{step.name} {step.arguments}]")
    elif isinstance(step, Observation):
        print(f"[{step.content}]")
    elif isinstance(step, Done):
        messages = step.messages  # to go on with
print()
