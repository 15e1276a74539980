"""The page: chat with a served model, its adapter beside its base, and follow training. `streamlit run` starts it (see run.py).

It knows the server by its HTTP interface alone: TNL_SERVER is its address, TNL_API_KEY its key.
What a model says is shown as text, never as Markdown or HTML, which could load a picture from elsewhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st

from tnl.page import runs
from tnl.page.client import Answer, Server, ServerError
from tnl.page.look import ICON, STYLE, plain
from tnl.page.talk import Turn, export, request
from tnl.page.texts import LANGUAGES, TEXTS, language_of

TICK = 0.1
"""Seconds between two looks at answers that are being drawn."""
Texts = Mapping[str, str]


@dataclass(frozen=True)
class Choice:
    """What the sidebar says."""

    models: list[str]
    """Those that answer: one, or two side by side."""
    system: str
    sampling: dict[str, Any]


def main() -> None:
    """Draw the page; Streamlit calls this anew after everything that the person does."""
    st.set_page_config("tnl", page_icon=ICON, layout="wide")
    st.html(STYLE)
    state = st.session_state
    state.setdefault("turns", [])
    state.setdefault("asked", False)
    state.setdefault("drawing", None)  # the Choice with which the last turn's answers are being drawn
    state.setdefault("language", language_of(st.context.locale))
    server = Server(os.environ.get("TNL_SERVER", "http://127.0.0.1:8000"), os.environ.get("TNL_API_KEY"))
    with st.sidebar:
        st.segmented_control(
            "语言 Language",
            list(LANGUAGES),
            key="language",
            format_func=LANGUAGES.__getitem__,
            label_visibility="collapsed",
            required=True,
        )
    texts = TEXTS[state.language]
    try:
        models = server.models()
    except ServerError as error:
        st.error(texts["no_server"])
        st.text(str(error))
        st.button(texts["retry"])
        return
    with st.sidebar:
        choice = choose(models, texts)
    if state.asked:
        state.asked, state.drawing = False, choice
    talk_tab, runs_tab = st.tabs([texts["talk"], texts["runs"]])
    with runs_tab:
        runs.show(server, texts)
    with talk_tab:
        talk(server, texts)


def choose(models: Sequence[Mapping[str, Any]], texts: Texts) -> Choice:
    """The sidebar: who answers, and how."""
    turns: list[Turn] = st.session_state.turns
    names = [model["id"] for model in models]
    base = models[0]["root"]
    tuned = [name for name in names if name != base]

    def titled(name: str) -> str:
        return f"{name} ({texts['base' if name == base else 'adapter']})"

    first = names.index(tuned[0]) if len(tuned) == 1 else 0
    model = st.selectbox(texts["model"], names, index=first, key="model", format_func=titled)
    asked = [model]
    if len(names) > 1 and st.toggle(texts["both"], key="both"):
        others = [name for name in (base, *tuned) if name != model]
        asked.append(st.selectbox(texts["other"], others, key="other", format_func=titled))
    own = next((found["system"] for found in models if found["id"] == model), None)
    system = st.text_area(texts["system"], key="system", placeholder=own or texts["system_none"], help=texts["system_help"], max_chars=4000)
    with st.expander(texts["sampling"]):
        sampling = choose_sampling(texts)
    with st.container(horizontal=True):
        st.button(texts["forget"], on_click=forget, disabled=not turns)
        data = "" if not turns or st.session_state.drawing else export(turns, system.strip())
        st.download_button(texts["export"], data, "talk.json", "application/json", on_click="ignore", disabled=not data)
    return Choice(asked, system.strip(), sampling)


def choose_sampling(texts: Texts) -> dict[str, Any]:
    """How answers are drawn; empty: as the model was taught."""
    taught = st.toggle(texts["taught"], True, key="taught")
    found = {
        "temperature": st.slider(texts["temperature"], 0.0, 2.0, 0.7, 0.05, key="temperature", disabled=taught),
        "top_p": st.slider(texts["top_p"], 0.05, 1.0, 0.9, 0.05, key="top_p", disabled=taught),
        "top_k": st.slider(texts["top_k"], 0, 200, 50, key="top_k", disabled=taught),
        "repetition_penalty": st.slider(texts["repetition_penalty"], 1.0, 2.0, 1.0, 0.05, key="repetition_penalty", disabled=taught),
        "max_tokens": st.number_input(texts["max_tokens"], 1, 100_000, 512, key="max_tokens", disabled=taught),
        "seed": st.number_input(texts["seed"], 0, 2**31, None, key="seed", placeholder=texts["seed_none"], disabled=taught),
    }
    return {} if taught else {name: value for name, value in found.items() if value is not None}


def talk(server: Server, texts: Texts) -> None:
    """The conversation, the line for the next question below it, and the answers that are being drawn."""
    state = st.session_state
    turns: list[Turn] = state.turns
    above = st.container(key="talk", height=480, border=False, autoscroll=True)
    with st.container(key="ask", horizontal=True, vertical_alignment="bottom"):
        st.chat_input(texts["ask"], key="question", max_chars=100_000, disabled=bool(state.drawing), on_submit=ask)
        if state.drawing:
            st.button(texts["stop"], key="stop", icon=":material/stop_circle:", on_click=stop)
        elif turns:
            st.button(texts["again"], key="again", icon=":material/refresh:", on_click=again)
    with above:
        if not turns:
            st.caption(texts["welcome"])
        for turn in turns[:-1] if state.drawing else turns:
            show_question(turn)
            with st.chat_message("assistant"):
                for answer, place in zip(turn.answers, places(turn.answers), strict=True):
                    Box(answer, place).show(texts)
        if state.drawing:
            draw(server, state.drawing, texts)


def ask() -> None:
    """Take the question that was typed."""
    state = st.session_state
    if question := (state.question or "").strip():
        state.turns.append(Turn(question))
        state.asked = True


def again() -> None:
    """Ask the last question once more."""
    st.session_state.turns[-1].answers.clear()
    st.session_state.asked = True


def stop() -> None:
    """End the answers that are being drawn."""
    for answer in st.session_state.turns[-1].answers:
        answer.close()
    st.session_state.drawing = None


def forget() -> None:
    """Begin a new conversation."""
    if st.session_state.turns:
        stop()
    st.session_state.turns.clear()


def draw(server: Server, choice: Choice, texts: Texts) -> None:
    """Ask for the last turn's answers, unless that is done, and show them as they come until all have ended.

    A control that is moved ends this script, and its next run goes on here. Where there is none, since the person has gone, nobody looks
    at the answers any more, and they end.
    """
    state = st.session_state
    turn: Turn = state.turns[-1]
    if not turn.answers:
        turn.answers = [server.answer(request(state.turns, model, choice.system, choice.sampling)) for model in choice.models]
    show_question(turn)
    with st.chat_message("assistant"):
        boxes = [Box(answer, place) for answer, place in zip(turn.answers, places(turn.answers), strict=True)]
    going = True
    while going:
        going = any(answer.finish is None for answer in turn.answers)
        for box in boxes:
            box.show(texts)
        time.sleep(TICK + len(turn.answers[0].text) / 200_000 if going else 0)
    state.drawing = None
    st.rerun()


def places(answers: Sequence[Answer]) -> Sequence[Any]:
    """Where a turn's answers stand: beside each other on a wide screen."""
    return st.columns(len(answers)) if len(answers) > 1 else [st.container() for _ in answers]


def show_question(turn: Turn) -> None:
    with st.chat_message("user"):
        st.text(turn.question)


class Box:
    """One answer on the page: who answers, what was said so far, and what it took."""

    def __init__(self, answer: Answer, place: Any) -> None:
        self.answer = answer
        with place:
            st.caption(plain(answer.model))
            self.text, self.note, self.fault = st.empty(), st.empty(), st.empty()

    def show(self, texts: Texts) -> None:
        """As it is now."""
        answer = self.answer
        answer.look()
        if answer.text:
            self.text.text(answer.text)
        self.note.caption(" · ".join(notes(answer, texts)))
        if answer.finish == "error":
            with self.fault.container():
                st.error(texts["failed"])
                st.text(answer.error)


def notes(answer: Answer, texts: Texts) -> list[str]:
    """What an answer took, and how it ended."""
    if answer.finish in (None, "stop") and not answer.text:
        return [texts["empty" if answer.finish else "reading"]]
    found = [texts["speed"].format(tokens=answer.tokens, speed=f"{answer.tokens_per_second:.3g}")] if answer.tokens_per_second else []
    return found + ([texts[answer.finish]] if answer.finish in ("stopped", "length") else [])


if __name__ == "__main__":
    main()
