"""Chat with a ChatGLM in the terminal; the program itself is chatglm/commands/chat.py."""

from chatglm.commands.chat import main
from chatglm.program import start

if __name__ == "__main__":
    start(main)
