"""How the page looks, and how a name is shown where Streamlit would read Markdown."""

from __future__ import annotations

import re

MARKS = re.compile(r"([\\`*_{}\[\]()#+\-.!~$:<>|])")
COLORS = {"light": ("#8c2f39", "#2f6f8c"), "dark": ("#d97a84", "#6fb3d2")}
"""Of lines in charts, by the browser's theme; the first is the page's."""
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="8" fill="#8c2f39"/>
<path d="M8 10h16M16 10v13" stroke="#fff" stroke-width="3.5" stroke-linecap="round"/></svg>"""

STYLE = """<style>
.stMainBlockContainer {max-width: 64rem; padding: 2.75rem 1.25rem 0.75rem;}
[data-testid="stLayoutWrapper"]:has(> .st-key-talk), .st-key-talk {
  height: calc(100dvh - 12rem) !important; min-height: 14rem; flex: none !important;
}
.st-key-talk {padding-right: 0.25rem;}
.st-key-talk [data-testid="stText"] {line-height: 1.65;}
[data-testid="stText"] {white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;}
.st-key-ask {flex-wrap: nowrap !important;}
.st-key-ask button[kind="secondary"] {min-height: 58px;}
.st-key-ask > :first-child {flex: 1 1 auto; min-width: 0;}
[data-testid="stMetricValue"] {font-size: 1.5rem;}
@media (max-width: 640px) {
  .stMainBlockContainer {padding: 3.75rem 0.75rem 0.5rem;}
  [data-testid="stLayoutWrapper"]:has(> .st-key-talk), .st-key-talk {height: calc(100dvh - 13rem) !important;}
  .st-key-ask button[kind="secondary"] p {font-size: 0;}
  [data-testid="stChatMessage"] {padding-left: 0.25rem; padding-right: 0.25rem;}
}
</style>"""


def plain(text: str) -> str:
    """A text that Markdown leaves as it is."""
    return MARKS.sub(r"\\\1", text)
