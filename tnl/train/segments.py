"""Whether a run's rows are computed whole or in segments, and of how many tokens: decided from the plan, before a weight is loaded."""

from dataclasses import dataclass, replace

import torch

from tnl.errors import MemoryBudgetError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.stream import SEGMENT
from tnl.recipe.sections import TrainSection
from tnl.train import plan
from tnl.train.plan import GIB, LADDER, Choice, Plan
from tnl.train.state_store import free_host_bytes, kept_bytes, on_host, place, state_bytes

SHORT = 1024
"""Tokens: in shorter segments a GPU is not busy and the states take much of the host, so every layer is recomputed in longer ones."""
LIVING = 6
"""Copies of a row's states on the device at once: before and after a segment, their gradients, one coming and one leaving."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a run are computed."""

    choice: Choice
    segment_length: int | None = None
    """A longer row is computed in segments; None: every row is whole."""
    every: int = 1
    """Of the longest row, the states of every so many segments are kept."""
    line: str = ""
    """What to say of the segments; empty where no record needs them."""


def lay_out(needs: Plan, config: TransnormerConfig, device: torch.device, room: float, longest: int, section: TrainSection) -> Layout:
    """Rows whole where the longest record fits, and no train.segment_length is shorter; else segments, and where their states wait.

    room: bytes of the device. Raises MemoryBudgetError where the segments asked for, or the states between them, do not fit;
    where nothing does, the choice says so (plan.require).
    """
    choice, length = fitting(needs, config, device, room, longest, section)
    if choice.budget is None or length is None or length >= longest:
        return Layout(choice, length)
    count, states = -(-longest // length), state_bytes(config)
    apart = device.type == "cuda" and on_host(section.state_offload, device)
    left = free_host_bytes() if apart else int(room - choice.needed)
    placed = place(count, length, states, section.state_offload, device, left)
    held = kept_bytes(count - 1, placed.every, states)
    line = words(length, choice.checkpointing, placed.every, held, f"{left / GIB:.1f} GiB of host memory" if apart else "")
    return Layout(choice if apart else replace(choice, needed=choice.needed + held), length, placed.every, line)


def fitting(
    needs: Plan, config: TransnormerConfig, device: torch.device, room: float, longest: int, section: TrainSection
) -> tuple[Choice, int | None]:
    """Which rows fit `room` bytes of a device, and of how many tokens segments are; None: no row needs them. Raises as lay_out."""
    most, asked = plan.longest_row(device, longest, section), section.segment_length
    states = LIVING * state_bytes(config)
    if asked is None:
        choice = plan.choose(needs, room, longest, section.gradient_checkpointing, most)
        found = None if choice.budget is not None else longest_segments(needs, room - states, longest, section)
        if found is None:
            return choice, None
        length, recompute = found
    else:
        length, recompute = as_asked(needs, room - states, min(asked, longest), section)
    extra = states if length < longest else 0
    budget = needs.row_budget(room - extra, recompute, min(most, asked or length)) or length
    return Choice(budget, recompute, needs.total(max(budget, length), recompute) + extra, room), asked or length


def longest_segments(needs: Plan, room: float, longest: int, section: TrainSection) -> tuple[int, bool] | None:
    """The longest segments that fit, at most SEGMENT, and whether layers are recomputed in them; None where none fits."""
    for recompute, least in ((section.gradient_checkpointing, SHORT), (True, LADDER[0])):
        for length in reversed(LADDER):
            if least <= length <= min(SEGMENT, longest) and needs.total(length, recompute) <= room:
                return length, recompute
    return None


def as_asked(needs: Plan, room: float, length: int, section: TrainSection) -> tuple[int, bool]:
    """The segments that the recipe asks for, with layers recomputed where they do not fit otherwise. Raises MemoryBudgetError."""
    for recompute in (True,) if section.gradient_checkpointing else (False, True):
        if needs.total(length, recompute) <= room:
            return length, recompute
    what = f"segments of {length:,} tokens need {needs.total(length, True) / GIB:.1f} GiB, recomputing every layer"
    fits = needs.row_budget(room, True, length)
    todo = f"This would fit: train.segment_length={fits}." if fits else "Take a smaller base model, or a larger card."
    raise MemoryBudgetError("train.segment_length", f"{what} (there are {max(room, 0) / GIB:.1f} GiB beside the states)", todo)


def words(length: int, recompute: bool, every: int, held: int, host: str) -> str:
    """The segments in one line; held: bytes of states; host: the room there is for them, "" where they are a part of what rows need."""
    where = f"{held / GIB:.1f} of {host}" if host else f"{held / GIB:.1f} GiB, counted above"
    kept = "" if every == 1 else f", 1 of {every} kept and the others computed again"
    again = ", every layer recomputed" if recompute else ""
    return f"longer rows: in segments of {length:,} tokens{again}, with the gradients of one pass; states between them: {where}{kept}"
