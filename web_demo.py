"""Chat with a ChatGLM in the browser; the program itself is chatglm/commands/web.py."""

from chatglm.commands.web import main
from chatglm.program import start

if __name__ == "__main__":
    start(main)
