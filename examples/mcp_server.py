"""An MCP server over standard input and output, with one tool. Needs `pip install mcp`.

    python cli_demo.py --model path/to/chatglm3-6b --mcp examples/mcp.json
"""

from mcp.server.mcpserver import MCPServer

server = MCPServer("weather")


@server.tool()
def get_weather(city: str) -> str:
    """Get the current weather of a city"""
    return f'{{"city": "{city}", "temperature": 12, "weather": "sunny"}}'


if __name__ == "__main__":
    server.run()  # over standard input and output
