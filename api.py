"""Serve a ChatGLM over HTTP; the program itself is chatglm/commands/serve.py."""

from chatglm.commands.serve import main
from chatglm.program import start

if __name__ == "__main__":
    start(main)
