"""The command line: one table from command to function, imported only when it is called, so that help and mistakes answer at once."""

import atexit
import errno
import importlib
import inspect
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from tnl import paths
from tnl.errors import StorageError, TnlError, one_line

TARGETS = {
    "train": "tnl.train.run:run",
    "resume": "tnl.train.run:resume",
    "check": "tnl.train.check:run",
    "chat": "tnl.generate.chat:run",
    "generate": "tnl.generate.run:run",
    "serve": "tnl.serve.run:run",
    "page": "tnl.page.run:run",
    "evaluate": "tnl.evaluate.run:run",
    "merge": "tnl.adapter.merge:run",
    "download": "tnl.hub:run",
    "push": "tnl.hubs.push:run",
    "demo": "tnl.train.demo:run",
}
SMALLER_STEP = "Use a smaller train.per_device_train_batch_size or data.max_length."
SMALLER_MODEL = "Use --dtype bfloat16, --device cpu or a smaller model."
LESS_MEMORY = {
    **dict.fromkeys(("train", "resume", "check", "evaluate", "demo"), SMALLER_STEP),
    **dict.fromkeys(("chat", "generate"), SMALLER_MODEL),
    **dict.fromkeys(("serve", "page"), SMALLER_MODEL.replace("or a smaller model", "a smaller model, or fewer --slots")),
    "merge": "Use --dtype bfloat16, or a machine with more memory: the whole model must fit.",
    "download": "End other programs, then repeat: what was fetched is kept.",
    "push": "End other programs, then repeat.",
}
"""What helps where memory ends outside a training step, which has its own advice."""
STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.EFBIG}
VANISHED = {errno.ENOENT, errno.ENOTDIR}
"""What was there when it was looked at and is no longer, such as the folder of a run that somebody deletes."""

app = typer.Typer(
    help="Fine-tune TransNormerLLM with LoRA and talk to the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Allow = Annotated[list[str] | None, typer.Option(help="A field of the run that may have changed since it began; recorded in run.json.")]
Memory = Annotated[float | None, typer.Option(min=0.5, help="GiB of the GPU that may be used, as if the card were smaller.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes on this machine that train together, one a GPU.")]
HubName = Literal["huggingface", "modelscope"]
Hub = Annotated[HubName, typer.Option(help="The hub.")]
HubOr = Annotated[HubName | None, typer.Option(help="Where owner/name is fetched from; huggingface without it.")]
Base = Annotated[str | None, typer.Option(help="The base model, where it is no longer where the run found it.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file such as those in recipes/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="Values that replace the recipe's.")]
Talker = Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model's folder, demo, the folder of a run, or owner/name on a hub.")]
Decorated = TypeVar("Decorated", bound=Callable[..., None])
Dtype = Literal["auto", "bfloat16", "float32"]
TALK: dict[str, tuple[Any, Any]] = {
    "system": (Annotated[str | None, typer.Option(help="The system prompt; without it that of the run.")], None),
    "template": (Annotated[str | None, typer.Option(help="How turns are written; without it as the run was taught.")], None),
    "temperature": (Annotated[float | None, typer.Option(min=0.0, help="0 always takes the most probable token.")], None),
    "top_p": (Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Draw from the tokens that together reach this share.")], None),
    "max_new_tokens": (Annotated[int | None, typer.Option(min=1, help="Tokens an answer may have.")], None),
    "base": (Base, None),
    "hub": (HubOr, None),
    "device": (Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")], "auto"),
    "dtype": (Annotated[Dtype, typer.Option(help="The numbers of the weights; auto: bfloat16 on a GPU, float32 elsewhere.")], "auto"),
}
"""What chat, generate, serve and page have in common: name -> (type and help, default)."""
SEED: dict[str, tuple[Any, Any]] = {
    "seed": (Annotated[int | None, typer.Option(min=0, help="Where the draws start: the same seed gives the same answer.")], None)
}
"""Of chat and generate alone: each request to a server has its own."""
SERVE: dict[str, tuple[Any, Any]] = {
    "adapters": (Annotated[Path | None, typer.Option(help="A folder of adapters or runs, each served by its name beside the base.")], None),
    "runs": (
        Annotated[Path | None, typer.Option(help="The folder of runs that GET /v1/runs shows; without it output/, if it is there.")],
        None,
    ),
    "api_key": (Annotated[str | None, typer.Option(envvar="TNL_API_KEY", help="Whoever asks must give it.")], None),
    "slots": (Annotated[int | None, typer.Option(min=1, help="Answers that run at a time.")], None),
    "state_writes": (
        Annotated[str, typer.Option(help="each-step; deferred: every 24th, for many slots; auto: so from 64 slots of a GPU.")],
        "auto",
    ),
    "queue": (Annotated[int | None, typer.Option(min=0, help="Requests that may wait; more get 429.")], None),
    "prefix_bytes": (Annotated[int | None, typer.Option(min=0, help="Memory for the states of prompts' beginnings.")], None),
    "max_prompt": (Annotated[int | None, typer.Option(min=1, help="Tokens a prompt may have; 32,768 without it.")], None),
    "max_tokens": (Annotated[int | None, typer.Option(min=1, help="Tokens an answer may be asked to have; 4,096 without it.")], None),
}
"""What serve and page have in common besides."""


def _takes(*tables: dict[str, tuple[Any, Any]]) -> Callable[[Decorated], Decorated]:
    """Replace a command's **options by those of the tables."""
    kind = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(name, kind, default=default, annotation=one) for table in tables for name, (one, default) in table.items()]

    def decorate(command: Decorated) -> Decorated:
        own = [one for one in inspect.signature(command).parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shared]}
        return command

    return decorate


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tnl {version('tnl')}")
        raise typer.Exit


@app.callback()
def _options(
    _wanted: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
    _debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipePath, overrides: Overrides = None, memory: Memory = None, allow_change: Allow = None, num_processes: Processes = None
) -> None:
    """Fine-tune as a recipe says; the same command again continues an unfinished run."""
    if os.environ.get("RANK", "0") == "0":  # of processes that were launched together the first speaks
        _check_recipe(recipe, overrides)
    if num_processes is not None:
        _launch(num_processes)
    _call("train", recipe, overrides or [], memory=memory, allow_change=allow_change or [])


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    memory: Memory = None,
    allow_change: Allow = None,
    num_processes: Processes = None,
) -> None:
    """Continue an unfinished run from its newest valid checkpoint."""
    if num_processes is not None:
        _launch(num_processes)
    _call("resume", run, memory=memory, allow_change=allow_change or [])


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, memory: Memory = None, allow_change: Allow = None) -> None:
    """Show what a recipe would do, without training: records, parameters, memory."""
    _check_recipe(recipe, overrides)
    _call("check", recipe, overrides or [], memory=memory, allow_change=allow_change or [])


@app.command()
@_takes(TALK, SEED)
def chat(
    model_or_run: Talker,
    resume: Annotated[Path | None, typer.Option(metavar="FILE", help="Go on with a conversation that /save kept.")] = None,
    **options: Any,
) -> None:
    """Talk to a model or to the result of a run."""
    _call("chat", model_or_run, resume, **options)


@app.command()
@_takes(TALK, SEED)
def generate(
    model_or_run: Talker,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The question.")] = None,
    file: Annotated[Path | None, typer.Option(help="Questions, one a line, instead of PROMPT.")] = None,
    **options: Any,
) -> None:
    """Answer one question, or each line of a file, and end."""
    _call("generate", model_or_run, prompt, file, **options)


@app.command()
@_takes(SERVE, TALK)
def serve(
    model_or_run: Talker,
    host: Annotated[str, typer.Option(help="The address to listen on; anything but 127.0.0.1 can be reached from outside.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port.")] = 8000,
    merge: Annotated[bool, typer.Option(help="Merge a single adapter into its base; --no-merge serves both.")] = True,
    **options: Any,
) -> None:
    """Answer OpenAI's API over HTTP: many conversations at a time, memory that does not grow."""
    if options["runs"] is None and Path("output").is_dir():
        options["runs"] = Path("output")
    _call("serve", model_or_run, host, port, merge=merge, **options)


@app.command()
@_takes(SERVE, TALK)
def page(
    model_or_run: Annotated[str | None, typer.Argument(metavar="MODEL_OR_RUN", help="As for serve; left out with --server.")] = None,
    server: Annotated[str | None, typer.Option(metavar="URL", help="A server that runs, instead of one of its own.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The page's port.")] = 8501,
    **options: Any,
) -> None:
    """Chat in the browser, the adapter beside its base, and follow training; for this machine alone."""
    _call("page", model_or_run, server, port, **options)


@app.command()
def evaluate(
    recipe_or_run: Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe (its base model) or a run (its adapter).")],
    overrides: Overrides = None,
) -> None:
    """Measure loss and perplexity on the held-out records."""
    if paths.is_recipe(recipe_or_run):
        _check_recipe(recipe_or_run, overrides)
    _call("evaluate", recipe_or_run, overrides or [])


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run or of an adapter, or owner/name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the merged model; must not exist.")],
    dtype: Annotated[Dtype, typer.Option(help="The numbers of the weights; auto: those of the base.")] = "auto",
    base: Base = None,
    hub: HubOr = None,
) -> None:
    """Write base and adapter as one model that needs no peft."""
    _call("merge", run, out, dtype, base, hub)


@app.command()
def download(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name, for example OpenNLPLab/TransNormerLLM-385M.")],
    hub: Hub = "huggingface",
    revision: Annotated[str | None, typer.Option(help="A commit, tag or branch.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder; without it the hub's cache.")] = None,
) -> None:
    """Fetch weights, config and tokenizer of a model: no code; an interrupted download goes on."""
    _call("download", repo, hub, revision, out)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name; it is made if it is not there.")],
    hub: Hub = "huggingface",
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; without it the repository is private.")] = False,
    base: Annotated[str | None, typer.Option(help="owner/name of the base on that hub, where the run trained on a local folder.")] = None,
) -> None:
    """Upload a run's adapter with a model card: base, data, recipe, losses, samples."""
    _call("push", run, repo, hub, public, base)


@app.command()
def demo(
    name: Annotated[str, typer.Option(help="The name that the persona learns.")] = "小明",
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("output/demo"),
) -> None:
    """Teach the small base that comes with tnl a persona, on this machine, in a few minutes."""
    _call("demo", name, out)


def _launch(count: int) -> None:
    """Start this command again in so many processes, and exit as they do."""
    # only who asks for processes needs them
    from tnl.train.launch import start

    given = iter(sys.argv[1:])
    # typer has read them: what is left is the same command without this option
    kept = [word for word in given if not (word.startswith("--num-processes") and ("=" in word or next(given)))]
    raise typer.Exit(start(count, kept))


def _check_recipe(recipe: Path, overrides: list[str] | None) -> None:
    """Find a recipe's mistakes before torch is imported."""
    # pydantic and ruamel.yaml: help need not wait for them
    from tnl.recipe.load import load

    load(recipe, overrides or [])


def _call(command: str, *arguments: Any, **options: Any) -> None:
    module, _, function = TARGETS[command].partition(":")
    getattr(importlib.import_module(module), function)(*arguments, **options)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code of what happened."""
    given = sys.argv[1:] if arguments is None else arguments
    options = given[: given.index("--")] if "--" in given else given
    debug = "--debug" in options
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace" if stream is sys.stdin else "backslashreplace")
    signal.signal(signal.SIGTERM, _stop)
    said = [_listen(stream) for stream in (sys.stdout, sys.stderr)]
    try:
        _check_folder()
        code = app([*(word for word in options if word != "--debug"), *given[len(options) :]], prog_name="tnl", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):  # typer makes exit 1 of it
            # the reader has gone: nothing can be said, and Python's own flush at exit must not complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]
            code = 141
        else:
            code = report(error, debug, next((word for word in options if word in TARGETS), ""))
    launched = any(word.startswith("--num-processes") for word in options)  # who was launched has spoken
    if code == 130 and not any(said) and not launched and os.environ.get("RANK", "0") == "0":  # typer makes a code of KeyboardInterrupt
        print("interrupted", file=sys.stderr)
    code = code if isinstance(code, int) else 0
    if "RANK" in os.environ:
        _end(code)
    sys.exit(code)


def _end(code: int) -> None:
    """End one of several processes: threads of gloo that outlive the interpreter would abort it, whatever it has done."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _check_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise StorageError("", "the current folder has been deleted", "Go to one that exists.") from None


def _listen(stream: Any) -> list[bool]:
    """Return a list that is filled with the first text that is written to a stream."""
    heard: list[bool] = []
    write = stream.write

    def listening(text: str) -> Any:
        stream.write = write
        heard.append(True)
        return write(text)

    stream.write = listening
    return heard


def report(error: BaseException, debug: bool, command: str = "") -> int:
    """Print one line on stderr for what went wrong, the traceback with debug; return the exit code."""
    if debug and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    error = _cause(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    code, line = _explain(error, command)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # the first of processes that train together says the same, and its launcher then ends this one
    if line:
        print(line, file=sys.stderr)
    return code


def _cause(error: BaseException) -> BaseException:
    """The signal where one is behind an error: transformers' lazy imports turn Ctrl-C into a module that is not found."""
    behind: BaseException | None = error
    while isinstance(behind, Exception) and not isinstance(behind, TnlError):
        behind = behind.__cause__ or behind.__context__
    return behind if isinstance(behind, KeyboardInterrupt) or (isinstance(behind, SystemExit) and behind.code == 143) else error


def _explain(error: BaseException, command: str) -> tuple[int, str]:
    if isinstance(error, TnlError):
        return error.exit_code, paths.nearby(f"error: {error}")
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return 130, ""
    if hasattr(error, "format_message"):
        return 2, _usage(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 7, _line(f"tnl {command}: out of memory", LESS_MEMORY.get(command, "End other programs, then repeat."))
    if isinstance(error, OSError) and (error.errno in STORAGE or (error.errno in VANISHED and error.filename)):
        return 6, _line(f"{error.filename or 'output'}: {error.strerror}", "Free or choose another place, then repeat.")
    if "RANK" in os.environ and _lost(error):
        todo = "See what it said, or whether the system killed it. Checkpoints are whole: the same command goes on."
        return 1, _line("another process of this run has ended, or kept it waiting longer than train.ddp_timeout", todo) if os.environ[
            "RANK"
        ] == "0" else ""
    todo = "Please report it with what the same command prints with --debug."
    return 70, _line(f"this is our bug ({type(error).__name__}: {str(error)[:300]})", todo)


def _lost(error: BaseException) -> bool:
    """Whether torch.distributed has lost the other processes."""
    return isinstance(error, RuntimeError) and (type(error).__name__.startswith("Dist") or "gloo" in str(error) or "NCCL" in str(error))


def _line(what: str, todo: str) -> str:
    return f"error: {one_line(what, todo)}"


def _usage(error: Any) -> str:
    """One line for a mistake in the command itself; click raises these."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return ""
    message = str(error.format_message()).strip().split("\n")[0].replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    todo = f"See {context.command_path} --help." if context else "See tnl --help."
    if type(error).__name__ == "NoSuchOption":
        message = f"no option is called {error.option_name}"
        near = paths.nearest(error.option_name, list(error.possibilities or []))
        keys = _recipe_keys(error.option_name.strip("-").replace("-", "_"))
        if keys and context and context.info_name in ("train", "check", "evaluate"):
            todo = f"A recipe's values are replaced by words without dashes: {keys[0]}=VALUE."
        elif near:
            todo = f"Did you mean {near}?"
    elif message.startswith("No such command '"):
        word = message.split("'")[1]
        near = paths.nearest(word, list(TARGETS))
        message = f"no command is called {word}"
        todo = f"Did you mean tnl {near}?" if near else f"There are {', '.join(TARGETS)}."
    return _line(f"command line: {message[0].lower()}{message[1:]}", todo)


def _recipe_keys(name: str) -> list[str]:
    # pydantic classes: only a mistake pays for them
    from tnl.recipe.old_names import RENAMED, SYNONYMS
    from tnl.recipe.sections import SECTIONS

    if name in SYNONYMS:
        return [SYNONYMS[name]]
    name = RENAMED.get(name, name)
    return [f"{section}.{name}" for section, model in SECTIONS.items() if name in model.model_fields]


def _stop(signal_number: int, _frame: object) -> None:
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    main()
