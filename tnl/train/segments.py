"""Whether a run's rows are computed whole or in segments, and of how many tokens: decided from the plan, before a weight is loaded."""

from dataclasses import dataclass, replace

import torch

from tnl.errors import MemoryBudgetError
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.stream import SEGMENT
from tnl.recipe.sections import TrainSection
from tnl.train import plan
from tnl.train.plan import AGAIN, GIB, LADDER, Choice, Plan
from tnl.train.recomputation import Level
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
    line = words(length, choice.level, placed.every, held, f"{left / GIB:.1f} GiB of host memory" if apart else "")
    whole = choice if apart else replace(choice, needed=choice.needed + held, otherwise=choice.otherwise + held)
    return Layout(whole, length, placed.every, line)


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
        length, level = found
    else:
        length, level = as_asked(needs, room - states, min(asked, longest), section)
    extra = states if length < longest else 0
    budget = needs.row_budget(room - extra, level, min(most, asked or length)) or length
    return plan.chosen(needs, budget, level, max(budget, length), room, extra), asked or length


def longest_segments(needs: Plan, room: float, longest: int, section: TrainSection) -> tuple[int, Level] | None:
    """The longest segments that fit, at most SEGMENT, and what is computed again in them; None where none fits."""
    levels = needs.levels(section.gradient_checkpointing, segments=True)
    for level, least in (*((level, SHORT) for level in levels), (levels[-1], LADDER[0])):
        for length in reversed(LADDER):
            if least <= length <= min(SEGMENT, longest) and needs.total(length, level) <= room:
                return length, level
    return None


def as_asked(needs: Plan, room: float, length: int, section: TrainSection) -> tuple[int, Level]:
    """The segments that the recipe asks for, with so much computed again that they fit. Raises MemoryBudgetError."""
    levels = needs.levels(section.gradient_checkpointing, segments=True)
    for level in levels:
        if needs.total(length, level) <= room:
            return length, level
    what = f"segments of {length:,} tokens need {needs.total(length, levels[-1]) / GIB:.1f} GiB, recomputing every layer"
    fits = needs.row_budget(room, levels[-1], length)
    todo = f"This would fit: train.segment_length={fits}." if fits else "Take a smaller base model, or a larger card."
    raise MemoryBudgetError("train.segment_length", f"{what} (there are {max(room, 0) / GIB:.1f} GiB beside the states)", todo)


def words(length: int, level: Level, every: int, held: int, host: str) -> str:
    """The segments in one line; held: bytes of states; host: the room there is for them, "" where they are a part of what rows need."""
    where = f"{held / GIB:.1f} of {host}" if host else f"{held / GIB:.1f} GiB, counted above"
    kept = "" if every == 1 else f", 1 of {every} kept and the others computed again"
    rows = f"longer rows: in segments of {length:,} tokens{AGAIN[level]}, with the gradients of one pass"
    return f"{rows}; states between them: {where}{kept}"
