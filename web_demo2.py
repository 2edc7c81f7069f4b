"""Chat with a ChatGLM in the browser, with streamlit: `streamlit run web_demo2.py -- --model FOLDER`."""

import sys

from chatglm.commands.web2 import show

if __name__ == "__main__":
    show(sys.argv[1:])
