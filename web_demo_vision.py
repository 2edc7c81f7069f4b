"""Chat about pictures in the browser; the program itself is chatglm/commands/web_vision.py."""

from chatglm.commands.web_vision import main
from chatglm.program import start

if __name__ == "__main__":
    start(main)
