"""What a run says to the person."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import nn

from tnl.data.build import Dataset
from tnl.evaluate import generation
from tnl.train import lora

console = Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """A line for the person."""
    console.print(line, markup=False)


def show_data(data: Dataset) -> None:
    """What was read, in a line or two."""
    report = data.report
    held = f", {report.eval_records:,} held out" if report.eval_records else ""
    lost = "".join(f", {count:,} {what}" for count, what in ((report.truncated, "cut"), (report.dropped, "dropped")) if count)
    learned = f"{report.tokens:,} tokens, {report.supervised:,} of them learned ({report.template})"
    say(f"data: {report.train_records:,} records{held}{lost}; {learned}")
    for line in report.notices:
        say(f"data: {line}")


def show_table(model: nn.Module) -> None:
    """Name, layers, parameters of all that is trained."""
    table = Table("trained", "layers", "parameters", box=None, pad_edge=False)
    for row in lora.table(model):
        table.add_row(row.name, str(row.layers), f"{row.parameters:,}")
    console.print(table)
    trained, everything = lora.count_parameters(model)
    say(f"{trained:,} of {everything:,} parameters are trained ({trained / everything:.2%})")


def show_samples(samples: Sequence[generation.Sample]) -> None:
    """Answers before and after, side by side."""
    table = Table("question", "before", "after", show_lines=True)
    for sample in samples[:3]:
        table.add_row(*(generation.short(text) for text in (sample.question, sample.before, sample.after)))
    console.print(table, markup=False)
