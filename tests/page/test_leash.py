"""What stands under a leash runs as it would without one, and ends with whoever holds it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import signal, sys, time
print(__name__, sys.argv[1:], repr(sys.stdin.read()), flush=True)
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "code":
    sys.exit(7)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "tnl.page.leash", "child", "stays"], stdin=subprocess.PIPE)
time.sleep(60)
"""
DEAF = "import sys; from tnl.page import leash; leash.hold.__defaults__ = (0.2,); sys.argv[1:] = ['child', 'deaf']; leash.main()"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which there is a module called child."""
    (tmp_path / "child.py").write_text(CHILD, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


def started(environment: dict[str, str], *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )


def test_the_module_runs_as_itself(environment: dict[str, str]) -> None:
    with started(environment, "-m", "tnl.page.leash", "child", "code", "two words") as process:
        assert process.stdout is not None
        assert process.stdout.read() == "__main__ ['code', 'two words'] ''\n"
    assert process.returncode == 7


@pytest.mark.parametrize(("deaf", "code"), [(False, -signal.SIGTERM), (True, 1)])
def test_it_ends_when_nobody_holds_it(environment: dict[str, str], deaf: bool, code: int) -> None:
    """By SIGTERM, and where that is ignored by force."""
    command = ("-c", DEAF) if deaf else ("-m", "tnl.page.leash", "child", "stays")
    with started(environment, *command) as process:
        assert process.stdout is not None and process.stdin is not None
        assert [process.stdout.readline() for _ in range(2)][1] == "ready\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(30) == code


def test_a_parent_that_is_killed_takes_it_along(environment: dict[str, str]) -> None:
    with started(environment, "-c", PARENT) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)][1] == "ready\n"
        parent.kill()
        parent.wait()
        assert parent.stdout.read() == ""  # at its end once the child, which writes there too, has gone
