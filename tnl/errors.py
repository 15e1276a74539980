"""What a person can mend, by kind.

The command line prints one line, `error: WHERE: WHAT. TO DO.`, and exits with the kind's code;
anything that is not a TnlError is our bug and exits 70.
"""

from pathlib import Path


class TnlError(Exception):
    """Something a person can mend.

    where: the file, or file:line N, file:record N, file:key; empty where no file is concerned.
    what: what is wrong, with what was found and what is needed in parentheses.
    todo: one sentence that says what to do next.
    """

    exit_code = 70

    def __init__(self, where: str | Path, what: str, todo: str = "") -> None:
        self.where, self.what, self.todo = str(where), what, todo
        super().__init__(one_line(f"{where}: {what}" if str(where) else what, todo))


class RecipeError(TnlError):
    """A recipe or a command line that cannot be carried out."""

    exit_code = 2


class DataError(TnlError):
    """Records that cannot be trained on."""

    exit_code = 3


class ModelError(TnlError):
    """A model, adapter, tokenizer or checkpoint that is refused."""

    exit_code = 4


class NumbersError(TnlError):
    """Numbers that are not finite, or gradients that are missing."""

    exit_code = 5


class StorageError(TnlError):
    """A disk that is full, read-only or broken."""

    exit_code = 6


class MemoryBudgetError(TnlError):
    """Work that does not fit the memory there is."""

    exit_code = 7


def install(extra: str) -> str:
    """What to do where an extra of ours is not installed: tnl is installed from its own folder, with the versions it was tried with."""
    return f'Install it in the folder of tnl: pip install -c constraints.txt -e ".[{extra}]"'


def one_line(what: str, todo: str = "") -> str:
    """Join what is wrong and what to do into one sentence pair on one line, control characters made visible."""
    ends = todo.strip()
    if ends and not ends.endswith(("?", "!", "...")):
        ends = f"{ends.rstrip('.')}."
    sentence = f"{what.rstrip().rstrip('.')}. {ends}".rstrip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in sentence)
