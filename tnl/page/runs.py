"""The tab that follows training: loss and speed as they are written, and answers before and after."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from tnl.page.client import Server, ServerError
from tnl.page.look import COLORS, plain

EVERY = 3.0
"""Seconds between two looks at the runs folder."""


@st.fragment(run_every=EVERY)
def show(server: Server, texts: Mapping[str, str]) -> None:
    """The tab; asks the server anew every few seconds."""
    try:
        known = {run["id"]: run for run in sorted(server.runs(), key=lambda run: -run["changed"])}
        if not known:
            st.info(texts["no_runs"])
            return
        name = st.selectbox(texts["run"], list(known), key="run", format_func=lambda name: label(known.get(name), name))
        run = server.run(name)
    except ServerError as error:
        st.warning(texts["no_server"])
        st.text(str(error))
        return
    numbers(run, texts)
    curves(run["metrics"] or [], texts)
    samples(run["samples"] or [], texts)


def label(run: Mapping[str, Any] | None, name: str) -> str:
    """A run as the list shows it: its name and when it was last written."""
    return name if run is None else f"{name} · {datetime.fromtimestamp(run['changed']):%Y-%m-%d %H:%M}"


def numbers(run: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Where the run stands, in large figures."""
    held_out = [line["eval_loss"] for line in run["metrics"] or [] if line.get("eval_loss") is not None]
    last = {**{key: value for line in run["metrics"] or [] for key, value in line.items()}, **run["last"]}
    shown = {"status": texts[run["status"]], "step": last.get("step"), "loss": last.get("loss")}
    shown |= {"eval_loss": held_out[-1]} if held_out else {}
    shown |= {"tokens_per_second": last.get("tokens_per_second")}
    with st.container(key="numbers", horizontal=True):
        for name, value in shown.items():
            st.metric(texts[name], "–" if value is None else plain(f"{value:,.4g}" if isinstance(value, float) else f"{value}"))


def curves(metrics: list[dict[str, Any]], texts: Mapping[str, str]) -> None:
    """Loss (training and held-out) and speed by step."""
    if not metrics:
        st.info(texts["no_metrics"])
        return
    for names in (("loss", "eval_loss"), ("tokens_per_second",)):
        points = [
            {"step": line["step"], "value": line[name], "series": texts[name]}
            for name in names
            for line in metrics
            if isinstance(line.get(name), int | float)
        ]
        if points:
            st.altair_chart(chart(pd.DataFrame(points), texts["step"], texts[names[0]]), width="stretch")


def chart(points: pd.DataFrame, x: str, y: str) -> alt.Chart:
    """A line a series over the steps; few points are marked."""
    series = list(dict.fromkeys(points["series"]))
    colors = COLORS["dark" if st.context.theme.type == "dark" else "light"]
    legend = alt.Legend(orient="top-right", title=None) if len(series) > 1 else None
    return (
        alt.Chart(points, height=240)
        .mark_line(point=len(points) <= 60)
        .encode(
            x=alt.X("step:Q", title=x, axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("value:Q", title=y, scale=alt.Scale(zero=False)),
            color=alt.Color("series:N", sort=series, legend=legend, scale=alt.Scale(range=list(colors))),
            tooltip=[alt.Tooltip("step:Q", title=x), alt.Tooltip("value:Q", title=y, format=".4g")],
        )
    )


def samples(found: list[dict[str, Any]], texts: Mapping[str, str]) -> None:
    """The same questions before and after training."""
    if not found:
        return
    st.markdown(f"**{texts['samples']}**")
    for sample in found:
        with st.container(border=True):
            st.text(str(sample.get("question") or ""))
            columns = st.columns(3)
            for column, name in zip(columns, ("before", "after", "expected"), strict=True):
                with column:
                    st.caption(texts[name])
                    st.text(str(sample.get(name) or texts["not_yet"]))
