"""The web page of ChatGLM2's `web_demo2.py`, built with streamlit: one chat, on the session and engine of the others.

Streamlit runs `show` from its beginning at every click; what lasts is in `st.session_state`, one for each visitor, and
in `engine`, one for all.
"""

from __future__ import annotations

import argparse
import json
import threading
from typing import Any, NoReturn

import streamlit as st

from ..demo import is_demo
from ..engine import Waiting
from ..front.arguments import (
    LibraryError,
    add_generation_arguments,
    add_model_arguments,
    generation_settings,
    load_from_arguments,
)
from ..front.messages import PAGE
from ..front.page.failures import reason
from ..front.session import Session
from ..language import browser_language


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        st.error(message)
        st.stop()
        raise SystemExit(message)  # only outside of streamlit, which does not come back from `stop`


@st.cache_resource(show_spinner="Loading the model …")
def engine(arguments: tuple[str, ...]) -> Any:
    """The one engine, for all visitors. Raises what loading a model raises."""
    from ..serving.chat_engine import ChatEngine

    model, tokenizer = load_from_arguments(parse(arguments))
    return ChatEngine(model, tokenizer)


def parse(arguments: tuple[str, ...]) -> argparse.Namespace:
    parser = _Parser("streamlit run web_demo2.py --", description=__doc__, add_help=False)
    add_model_arguments(parser, "streamlit")
    add_generation_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt to begin with")
    return parser.parse_args(arguments)


def show(arguments: list[str]) -> None:
    """Draws the page for one visitor and answers the question, if there is one."""
    language = browser_language(st.context.headers.get("accept-language") or "")
    text = {key: texts[language] for key, texts in PAGE.items()}
    st.set_page_config(page_title="ChatGLM")
    args = parse(tuple(arguments))
    try:
        answers = engine(tuple(arguments))
        known = answers.tokenizer.chat_format
        if "session" not in st.session_state:
            st.session_state.session = Session(known, args.system)
    except (OSError, ValueError, RuntimeError, LibraryError) as error:
        st.error(str(error))
        st.stop()
    session: Session = st.session_state.session
    st.title(known.name)
    if is_demo(answers.model.name_or_path):
        st.caption(text["demo"].replace("{millions}", str(round(answers.model.num_parameters() / 1e6))))
    settings = {**generation_settings(args), **_sidebar(session, text, generation_settings(args))}
    for message in known.as_messages(session.history):
        if message["role"] != "system":
            _bubble(message["role"]).markdown(_shown(message))
    question = st.chat_input(text[session.next_role if session.next_role == "observation" else "question"])
    if question and question.strip():
        _answer(answers, session, question, settings, language)


def _sidebar(session: Session, text: dict[str, str], begin: dict[str, Any]) -> dict[str, Any]:
    """The sliders, the system prompt and the button for a new chat; returns the settings."""
    most, length, top_p, temperature = session.chat_format.sliders
    with st.sidebar:
        if session.chat_format.knows_system_prompt:
            system = st.text_area(text["system"], next((m["content"] for m in session.system), ""))
            if system != next((m["content"] for m in session.system), ""):
                session.set_system(system)
        settings = {
            "max_length": st.slider(text["max_length"], 0, most, begin.get("max_length", length)),
            "top_p": st.slider(text["top_p"], 0.0, 1.0, begin.get("top_p", top_p), step=0.01),
            "temperature": st.slider(text["temperature"], 0.0, 1.0, begin.get("temperature", temperature), step=0.01),
        }
        if st.button(text["new"]):
            session.clear()
    return settings


def _answer(answers: Any, session: Session, question: str, settings: dict[str, Any], language: str) -> None:
    """Shows the answer as it grows and keeps the turn; any click of the visitor stops it."""
    role = session.next_role
    _bubble(role).markdown(_inert(question))
    place = _bubble("assistant").empty()
    cancel = threading.Event()
    try:
        for step in answers.chat_in_queue(question, session.history, role=role, cancel=cancel, **settings):
            if isinstance(step, Waiting):
                place.caption(PAGE["waiting"][language].format(before=step.before))
                continue
            place.markdown(_inert(step.text))
            if step.finish_reason:
                session.history = step.history
                place.markdown(_shown(session.chat_format.as_messages(step.history)[-1]))
    except Exception as error:  # its reason for the visitor, or streamlit's own, which end this run
        if type(error).__module__.startswith("streamlit"):
            raise
        place.error(reason(error, language))
    finally:
        cancel.set()


def _bubble(role: str) -> Any:
    return st.chat_message("assistant" if role == "assistant" else "user")


def _shown(message: dict[str, Any]) -> str:
    """A message as Markdown; a call with the tool's name above it."""
    name = message.get("metadata")
    content = _inert(message["content"])
    return f"`{json.dumps(name)}`\n\n{content}" if name else content


def _inert(text: str) -> str:
    """Text whose pictures the browser does not fetch: they would tell another server of this chat."""
    return text.replace("![", "!\u2060[")
