"""The command line: answers at once, one line a mistake, the right exit code."""

import errno
import importlib
import inspect
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tnl import cli
from tnl.errors import DataError, MemoryBudgetError, ModelError, NumbersError, RecipeError, StorageError

SMALL = "model:\n  path: demo\ndata:\n  train: records.json\n"


def tnl(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tnl.cli", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL, timeout=60)


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Put a function in the place of every command's; return what it was called with."""

    def put(function: Callable[..., Any] | None = None) -> list[Any]:
        calls: list[Any] = []

        def called(*arguments: Any, **options: Any) -> None:
            calls.append((arguments, options))
            if function:
                function(*arguments, **options)

        module = types.SimpleNamespace(run=called, resume=called)
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
        return calls

    return put


def main(*arguments: str) -> int:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["train", "--help"], ["trian"], ["train", "recipe.yaml"], ["check", "recipe.yaml", "train.sead=1"]],
)
def test_it_answers_within_half_a_second_and_without_torch(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(SMALL + "lora:\n  rank: 8\n", encoding="utf-8")
    seconds = []
    for _ in range(3):
        before, start = os.times(), time.perf_counter()
        done = tnl(*arguments, cwd=tmp_path)
        after = os.times()
        # one thread that waits for nothing: on a busy machine the time it computes is what it would take on a free one
        computing = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(min(time.perf_counter() - start, computing))
    assert min(seconds) < 0.5, (seconds, done.stderr)
    code = f"import sys\nfrom tnl.cli import main\ntry:\n  main({arguments!r})\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft', 'numpy', 'huggingface_hub')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_help_names_every_command() -> None:
    done = tnl("--help", COLUMNS="100")
    assert done.returncode == 0
    for command in cli.TARGETS:
        assert f" {command} " in done.stdout
    assert [command.name or command.callback.__name__ for command in cli.app.registered_commands] == list(cli.TARGETS)  # type: ignore[union-attr]


def test_no_arguments_print_the_help() -> None:
    done = tnl()
    assert done.returncode == 2 and "Usage: tnl" in done.stdout + done.stderr


def test_version() -> None:
    assert tnl("--version").stdout.startswith("tnl 0.")


SERVE = {"merge": False} | {name: default for name, (_, default) in (cli.SERVE | cli.TALK).items()}


@pytest.mark.parametrize("command", list(cli.TARGETS))
def test_every_target_exists_and_takes_what_it_is_given(command: str) -> None:
    module, _, function = cli.TARGETS[command].partition(":")
    target = getattr(importlib.import_module(module), function)
    options = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    names = [parameter.name for parameter in options if parameter.name not in ("help", "num_processes")]
    positional = {"serve": ("model_or_run", "host", "port"), "page": ("model_or_run", "server", "port")}.get(command, names)
    by_name = ("memory", "allow_change", *((cli.SEED | cli.TALK) if command in ("chat", "generate") else ()))
    shared = [name for name in names if name in by_name or name not in positional]
    inspect.signature(target).bind(*(name for name in names if name not in shared), **dict.fromkeys(shared))


@pytest.mark.parametrize("option", [["--num-processes", "3"], ["--num-processes=3"]])
def test_several_processes_run_the_same_command_without_that_option(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text(SMALL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr("tnl.train.launch.start", lambda count, arguments: asked.append((count, arguments)) or 7)
    given = ["train", "r.yaml", *option, "train.seed=1"]
    monkeypatch.setattr(sys, "argv", ["tnl", *given])
    assert main(*given) == 7 and asked == [(3, ["train", "r.yaml", "train.seed=1"])]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["train", "r.yaml", "train.seed=1", "lora.r=2"],
            ((Path("r.yaml"), ["train.seed=1", "lora.r=2"]), {"memory": None, "allow_change": []}),
        ),
        (["train", "r.yaml", "train.max_steps=-1"], ((Path("r.yaml"), ["train.max_steps=-1"]), {"memory": None, "allow_change": []})),
        (["check", "r.yaml", "--memory", "24"], ((Path("r.yaml"), []), {"memory": 24.0, "allow_change": []})),
        (["resume", "output/x", "--allow-change", "train.seed"], ((Path("output/x"),), {"memory": None, "allow_change": ["train.seed"]})),
        (["merge", "output/x", "merged"], ((Path("output/x"), Path("merged"), "auto", None, None), {})),
        (["merge", "a/b", "m", "--dtype", "float32", "--hub", "modelscope"], ((Path("a/b"), Path("m"), "float32", None, "modelscope"), {})),
        (["download", "a/b", "--hub", "modelscope"], (("a/b", "modelscope", None, None), {})),
        (["demo", "--name", "小红"], (("小红", Path("output/demo")), {})),
        (["evaluate", "r.yaml"], ((Path("r.yaml"), []), {})),
        (["serve", "demo", "--port", "8080", "--no-merge"], (("demo", "127.0.0.1", 8080), SERVE)),
    ],
)
def test_arguments_reach_their_function(
    arguments: list[str], expected: Any, target: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(SMALL, encoding="utf-8")
    calls = target()
    assert main(*arguments) == 0
    assert calls == [expected]


def test_chat_hands_on_its_options(target: Callable[..., list[Any]]) -> None:
    calls = target()
    assert (
        main(
            "chat",
            "output/x",
            "--temperature",
            "0",
            "--top-p",
            "0.5",
            "--max-new-tokens",
            "9",
            "--seed",
            "3",
            "--base",
            "b",
            "--hub",
            "modelscope",
        )
        == 0
    )
    assert calls[0][0] == ("output/x", None)
    assert main("chat", "output/x", "--resume", "talk.safetensors") == 0 and calls[1][0] == ("output/x", Path("talk.safetensors"))
    given = {name: value for name, value in calls[0][1].items() if value is not None}
    assert given == {
        "temperature": 0.0,
        "top_p": 0.5,
        "max_new_tokens": 9,
        "seed": 3,
        "base": "b",
        "hub": "modelscope",
        "device": "auto",
        "dtype": "auto",
    }


def test_generate_hands_on_prompt_and_file(target: Callable[..., list[Any]]) -> None:
    calls = target()
    assert main("generate", "demo", "你是谁？", "--dtype", "float32") == 0
    assert main("generate", "demo", "--file", "questions.txt") == 0
    assert calls[0][0] == ("demo", "你是谁？", None) and calls[0][1]["dtype"] == "float32"
    assert calls[1][0] == ("demo", None, Path("questions.txt")) and set(calls[1][1]) == set(cli.TALK | cli.SEED)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "command line: no command is called trian. Did you mean tnl train?"),
        (["zzz"], "command line: no command is called zzz. There are train, resume"),
        (["train"], "command line: missing argument 'RECIPE'. See tnl train --help."),
        (["chat", "x", "--temprature", "1"], "command line: no option is called --temprature. Did you mean --temperature?"),
        (["chat", "x", "--temperature", "hot"], "command line: invalid value for '--temperature'"),
        (["chat", "x", "--top-p", "2"], "command line: invalid value for '--top-p'"),
        (["serve", "x", "--seed", "3"], "command line: no option is called --seed."),
        (["chat", "a/b", "--hub", "gitee"], "command line: invalid value for '--hub': 'gitee' is not one of 'huggingface', 'modelscope'."),
        (["chat", "x", "--seed"], "command line: option '--seed' requires an argument"),
        (["train", "r.yaml", "--learning-rate", "1"], "replaced by words without dashes: train.learning_rate=VALUE"),
        (["train", "r.yaml", "--batch_size", "4"], "without dashes: train.per_device_train_batch_size=VALUE"),
        (["train", "r.yaml", "--lr", "1"], "without dashes: train.learning_rate=VALUE"),
        (["train", "r.yaml", "--evaluation-strategy", "no"], "without dashes: train.eval_strategy=VALUE"),
        (["merge", "a", "b", "c"], "command line: got unexpected extra argument"),
        (["train", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and said in captured.err


@pytest.mark.parametrize(
    "command",
    [
        ["resume", "{}"],
        ["chat", "{}"],
        ["generate", "{}", "hello"],
        ["serve", "{}"],
        ["evaluate", "{}"],
        ["merge", "{}", "merged"],
        ["push", "{}", "me/x"],
    ],
)
def test_a_run_that_is_not_there_is_one_mistake_for_all_commands(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("output/huanhuan").mkdir(parents=True)
    assert main(*(word.format("output/huanhua") for word in command)) == 4
    assert capsys.readouterr() == ("", "error: output/huanhua: no such folder. Did you mean output/huanhuan?\n")
    assert main(*(word.format("$NOWHERE/huanhuan") for word in command)) == 4
    assert capsys.readouterr() == ("", "error: $NOWHERE/huanhuan: $NOWHERE is not set. Set it, or write the path out.\n")
    assert sorted(Path().iterdir()) == [Path("output")]


def test_a_file_of_questions_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("questions.txt").touch()
    assert main("generate", "demo", "--file", "question.txt") == 3
    assert capsys.readouterr().err == "error: question.txt: no such file. Did you mean questions.txt?\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError("r.yaml:line 1", "wrong", "Mend it."), 2, "error: r.yaml:line 1: wrong. Mend it.\n"),
        (DataError("a.json:record 2", "wrong"), 3, "error: a.json:record 2: wrong.\n"),
        (ModelError("m", "wrong"), 4, "error: m: wrong.\n"),
        (NumbersError("", "the loss is nan"), 5, "error: the loss is nan.\n"),
        (StorageError("/x", "full"), 6, "error: /x: full.\n"),
        (MemoryBudgetError("", "too much"), 7, "error: too much.\n"),
        (MemoryError(), 7, "error: tnl resume: out of memory. Use a smaller"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 6, "error: /x/y: No space left on device. Free"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/y"), 6, "error: /x/y: No such file or directory. Free"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(143), 143, ""),
        (
            KeyError("weight"),
            70,
            "error: this is our bug (KeyError: 'weight'). Please report it with what the same command prints with --debug.\n",
        ),
        (OSError("odd"), 70, "error: this is our bug (OSError: odd)."),
        (ValueError("two\nlines"), 70, "error: this is our bug (ValueError: two\\nlines)."),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, said: str, target: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    target(fail)
    assert main("resume", "x") == code
    captured = capsys.readouterr()
    assert captured.err.startswith(said) and "Traceback" not in captured.err and captured.err.count("\n") <= 1


@pytest.mark.parametrize(
    ("arguments", "helps"),
    [
        (["chat", "x"], "--device cpu or a smaller model"),
        (["generate", "x", "train"], "--device cpu or a smaller model"),
        (["merge", "a", "b"], "--dtype bfloat16"),
        (["download", "a/b"], "what was fetched is kept"),
    ],
)
def test_out_of_memory_says_what_helps_this_command(
    arguments: list[str], helps: str, target: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise MemoryError

    target(fail)
    assert main(*arguments) == 7
    said = capsys.readouterr().err
    assert said.startswith(f"error: tnl {arguments[0]}: out of memory. ") and helps in said and "batch_size" not in said
    assert set(cli.LESS_MEMORY) == set(cli.TARGETS)


@pytest.mark.parametrize(("stop", "code", "said"), [(KeyboardInterrupt(), 130, "interrupted\n"), (SystemExit(143), 143, "")])
def test_a_signal_that_an_import_swallowed_is_no_bug_of_ours(
    stop: BaseException, code: int, said: str, target: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def swallow(*given: Any, **options: Any) -> None:
        try:
            raise stop
        except BaseException as error:  # as transformers' lazy imports do
            raise ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'") from error

    target(swallow)
    assert main("resume", "x") == code
    assert capsys.readouterr().err == said


def test_an_error_shows_paths_from_here(
    target: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise DataError(f"{tmp_path}/a.json:record 3", "no such file", f"Did you mean {tmp_path}/b.json?")

    monkeypatch.chdir(tmp_path)
    target(fail)
    assert main("resume", "x") == 3
    assert capsys.readouterr().err == "error: a.json:record 3: no such file. Did you mean b.json?\n"


@pytest.mark.parametrize("arguments", [["chat", "demo", "--dtype", "float16"], ["merge", "a", "b", "--dtype", "int8"]])
def test_a_dtype_that_is_none_is_a_mistake(
    arguments: list[str], target: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert target() == [] and main(*arguments) == 2
    said = capsys.readouterr().err
    assert "--dtype" in said and "bfloat16" in said and "float32" in said and said.count("\n") == 1


def test_an_interrupt_after_words_of_its_own_says_no_more(target: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*given: Any, **options: Any) -> None:
        print("saved")
        raise KeyboardInterrupt

    target(stop)
    assert main("resume", "x") == 130
    assert capsys.readouterr() == ("saved\n", "")


@pytest.mark.parametrize("arguments", [["--debug", "resume", "x"], ["resume", "x", "--debug"]])
def test_debug_prints_the_traceback(arguments: list[str], target: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise DataError("a.json", "wrong")

    target(fail)
    assert main(*arguments) == 3
    captured = capsys.readouterr()
    assert "Traceback" in captured.err and captured.err.endswith("error: a.json: wrong.\n")


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    done = tnl("train", "甄嬛.yaml", cwd=tmp_path, LANG="C", LC_ALL="C")
    assert done.returncode == 2 and "甄嬛.yaml" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a folder that is in use")
def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    code = f"import os\nos.chdir({str(tmp_path)!r})\nos.rmdir({str(tmp_path)!r})\nfrom tnl.cli import main\nmain(['train', 'r.yaml'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (6, "error: the current folder has been deleted. Go to one that exists.\n")


def test_no_home_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(SMALL + "lora:\n  rank: 8\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    command = [sys.executable, "-m", "tnl.cli", "train", "r.yaml", "data.eval=~nobody/x"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Here it is called lora.r" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run([sys.executable, "-m", "tnl.cli", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (6, "error: output: No space left on device. Free or choose another place, then repeat.\n")


def test_a_reader_that_has_gone_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-m", "tnl.cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(30) in (0, 141)
    assert process.stderr.read() == b""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_terminated_exits_143() -> None:
    code = "import os, signal, types, importlib, time\nfrom tnl import cli\n"
    code += "def run(*a, **o):\n  print('on', flush=True)\n  time.sleep(30)\n"
    code += "cli.importlib = types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace(resume=run))\ncli.main(['resume', 'x'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert b"Traceback" not in process.stderr.read()
