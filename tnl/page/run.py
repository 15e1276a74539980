"""`tnl page`: the page in a browser of this machine, and the server behind it."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tnl.errors import RecipeError, install

APP = Path(__file__).with_name("app.py")
HOST = "127.0.0.1"
LEASHED = (sys.executable, "-m", "tnl.page.leash")
"""How children are started, so that none outlives this process."""
STREAMLIT = (
    f"--server.address={HOST}",
    f"--server.allowedHosts={HOST}",
    "--server.allowedHosts=localhost",
    "--server.headless=true",
    "--server.fileWatcherType=none",
    "--server.maxUploadSize=1",
    "--browser.gatherUsageStats=false",
    "--client.toolbarMode=minimal",
    "--client.showErrorDetails=none",
    "--runner.magicEnabled=false",
    "--logger.hideWelcomeMessage=true",
    "--theme.light.primaryColor=#8c2f39",
    "--theme.dark.primaryColor=#d97a84",
)
"""Streamlit listens everywhere and sends statistics unless told."""
REQUEST_LOG = " tnl.serve.gate "
"""What marks the server's line for a request: the page asks often, and the terminal need not tell."""


def run(model_or_run: str | None, server: str | None, port: int, *, api_key: str | None = None, **options: Any) -> None:
    """Serve the page until SIGTERM or SIGINT, then return.

    model_or_run: what a server of its own is started with, beside `tnl serve`'s options; server: the address of one that runs.
    Raises RecipeError, and SystemExit with the server's code where the server ends by itself.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise RecipeError("", "the page needs the package streamlit, which is not installed", install("page"))
    given = {name: value for name, value in options.items() if value is not None}
    check(model_or_run, server, given)
    check_port(port)
    environment = {**os.environ, **({"TNL_API_KEY": api_key} if api_key else {})}
    with contextlib.ExitStack() as stack:
        stack.enter_context(stopped_by_signals())
        processes: list[subprocess.Popen[str]] = []
        if model_or_run is not None:
            server, process = start_server(model_or_run, given, environment, stack)
            processes.append(process)
        page = start_page(port, {**environment, "TNL_SERVER": server or ""}, stack)
        print(f"http://{HOST}:{port}", flush=True)
        while page.poll() is None and all(process.poll() is None for process in processes):
            time.sleep(0.2)
        for process in processes:
            if process.returncode is not None:
                raise SystemExit(process.returncode or 1)
        raise RuntimeError(f"the page ended by itself (code {page.returncode})")


def check(model_or_run: str | None, server: str | None, given: Mapping[str, Any]) -> None:
    """Hold the options against each other. Raises RecipeError."""
    if (model_or_run is None) == (server is None):
        what = "both MODEL_OR_RUN and --server are given" if server else "there is nobody to talk to"
        raise RecipeError("command line", what, "Give MODEL_OR_RUN, or --server with the address of one that runs")
    if server is None:
        return
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError("--server", f"{server} is no address of a server", "Give one like http://127.0.0.1:8000")
    if own := next((name for name, value in given.items() if value != "auto"), None):
        flag = f"--{own.replace('_', '-')}"
        raise RecipeError(flag, "the server that runs has options of its own", f"Leave {flag} out, or give it to tnl serve")


def check_port(port: int) -> None:
    """Raises RecipeError where the page's port is taken."""
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        what = f"{HOST}:{port} cannot be used ({error.strerror})"
        raise RecipeError("--port", what, "Stop what uses it, or take another port") from None


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end what stands inside, and nothing is wrong."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def start_server(
    model_or_run: str, given: Mapping[str, Any], environment: Mapping[str, str], stack: contextlib.ExitStack
) -> tuple[str, subprocess.Popen[str]]:
    """Start `tnl serve` on a free port, the adapter beside its base, and wait until it answers. Raises SystemExit where it ends."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [*LEASHED, "tnl", "serve", "--no-merge", "--port", str(port), *options, "--", model_or_run]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace"
    )
    telling = threading.Thread(target=pass_on, args=(process,), daemon=True)
    telling.start()
    stack.callback(telling.join, 5)
    stack.callback(end, process)
    while not healthy(port):
        if process.poll() is not None:
            raise SystemExit(process.returncode or 1)
        time.sleep(0.1)
    return f"http://{HOST}:{port}", process


def start_page(port: int, environment: Mapping[str, str], stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    """Start Streamlit."""
    command = [*LEASHED, "streamlit", "run", str(APP), *STREAMLIT, f"--server.port={port}"]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
    stack.callback(end, process)
    return process


def healthy(port: int) -> bool:
    """Whether the server answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def pass_on(process: subprocess.Popen[str]) -> None:
    """Show what the server says, without its line for every request."""
    assert process.stderr is not None
    for line in process.stderr:
        if REQUEST_LOG not in line:
            sys.stderr.write(line)
            sys.stderr.flush()


def end(process: subprocess.Popen[Any]) -> None:
    """Ask a process to end, and see that it does."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
