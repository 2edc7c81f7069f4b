"""Chat about pictures in the terminal; the program itself is chatglm/commands/chat_vision.py."""

from chatglm.commands.chat_vision import main
from chatglm.program import start

if __name__ == "__main__":
    start(main)
