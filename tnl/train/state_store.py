"""Where a streamed row's states lie between the two passes: on the device, or in pinned host memory with copies beside the computation."""

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tnl.errors import MemoryBudgetError
from tnl.host import available
from tnl.model.configuration_transnormer import TransnormerConfig

GIB = 1024**3
HOST_SHARE = 0.8
"""How much of the host memory that is free the states may take."""

Offload = Literal["auto", "gpu", "host"]


class StateStore:
    """Lists of tensors by segment. With `host`, a copy to the host runs on a stream of its own while the device computes on, and
    `fetch` brings it back ahead of its use. Holds at most two lists on the device then, the one in use left out.
    """

    def __init__(self, device: torch.device, host: bool) -> None:
        self.device, self.host = device, host
        self.lane: Any = torch.cuda.Stream(device) if host and device.type == "cuda" else None
        self.kept: dict[int, list[Tensor]] = {}
        self.coming: dict[int, list[Tensor]] = {}
        self.leaving: list[Tensor] = []

    def put(self, segment: int, states: list[Tensor]) -> None:
        """Keep the states that `segment` starts from."""
        if not self.host:
            self.kept[segment] = states
            return
        self.settle()
        pinned = self.lane is not None
        copies = [torch.empty(state.shape, dtype=state.dtype, pin_memory=pinned) for state in states]
        with self.aside():
            for copy, state in zip(copies, states):
                copy.copy_(state, non_blocking=pinned)
        self.kept[segment], self.leaving = copies, states

    def fetch(self, segment: int) -> None:
        """Begin to bring back what `take` will ask for; nothing happens where there is nothing to bring."""
        if not self.host or segment in self.coming or segment not in self.kept:
            return
        self.settle()
        copies = self.kept.pop(segment)
        # made outside the lane: their memory comes from, and goes back to, the computation's stream
        states = [torch.empty(copy.shape, dtype=copy.dtype, device=self.device) for copy in copies]
        with self.aside():
            for state, copy in zip(states, copies):
                state.copy_(copy, non_blocking=True)  # the pinned memory is not handed out again before the copy has run
        self.coming[segment] = states

    def take(self, segment: int) -> list[Tensor]:
        """The states that `segment` starts from; the store forgets them."""
        if not self.host:
            return self.kept.pop(segment)
        self.fetch(segment)
        self.settle()
        return self.coming.pop(segment)

    def settle(self) -> None:
        """What the computation's stream does from here on comes after all copies; they are long over when the next one is asked for."""
        if self.lane is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.lane)
        self.leaving = []

    @contextlib.contextmanager
    def aside(self) -> Any:
        """Copies inside run beside the computation, but after all of it that has been asked for."""
        if self.lane is None:
            yield
            return
        self.lane.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.lane):
            yield


@dataclass(frozen=True)
class Placement:
    """Where states are kept, and of how many segments."""

    host: bool
    every: int
    """The start of every so many segments is kept; those between are computed again."""


def place(segments: int, length: int, state_bytes: int, offload: Offload, device: torch.device, room: int | None = None) -> Placement:
    """Where the states of a row of so many segments of `length` tokens go. On a GPU `auto` takes the host, whose copies cost no time,
    and keeps every k-th where memory is short; with gpu or host each segment's start must fit there.

    room: bytes there are (default: what is free). Raises MemoryBudgetError.
    """
    host = on_host(offload, device)
    on_gpu = device.type == "cuda" and not host
    if room is None:
        room = free_device_bytes(device) if on_gpu else free_host_bytes()
    kept = max(segments - 1, 0)  # the first one's is zero
    if kept * state_bytes <= room:
        return Placement(host, 1)
    where = "GPU memory" if on_gpu else "host memory"
    needed, least = kept * state_bytes, kept_bytes(kept, best_every(kept), state_bytes)
    held = max(room // state_bytes + 1, 1) * length
    what = f"the states of a row of {segments * length:,} tokens need {needed / GIB:.1f} GiB of {where} ({segments:,} segments of"
    what += f" {state_bytes / 2**20:.3g} MiB; there are {max(room, 0) / GIB:.1f} GiB, enough for {held:,} tokens)"
    if least > room:
        todo = f"Even every k-th needs {least / GIB:.1f} GiB. This would fit: data.max_length={held}, or a longer train.segment_length."
        raise MemoryBudgetError("", what, todo)
    every = next(k for k in range(2, kept + 1) if kept_bytes(kept, k, state_bytes) <= room)
    if offload != "auto":
        todo = f"This would fit: train.state_offload=auto, which keeps 1 of {every} in {where} and computes the others again."
        raise MemoryBudgetError("train.state_offload", what, todo)
    return Placement(host, every)


def on_host(offload: Offload, device: torch.device) -> bool:
    """Whether states leave the device."""
    return offload == "host" or (offload == "auto" and device.type == "cuda")


def kept_bytes(kept: int, every: int, state_bytes: int) -> int:
    """Bytes of all states that live at once: every k-th, and those of one group between."""
    return (kept // every + every - 1) * state_bytes if kept else 0


def best_every(kept: int) -> int:
    """The k that needs least memory."""
    return min(range(1, max(kept, 1) + 1), key=lambda k: (kept_bytes(kept, k, 1), k))


def state_bytes(config: TransnormerConfig) -> int:
    """Bytes of all layers' states after some segment of one row, in float32."""
    width = config.hidden_dim // config.decoder_attention_heads
    doubled = sum(map(bool, config.linear_use_lrpe_list or []))
    return (config.decoder_layers + doubled) * config.decoder_attention_heads * width * width * 4


def free_host_bytes() -> int:
    """Bytes of the host that states may take: a share of what is free, with what PyTorch holds pinned for its next use."""
    free = available()
    if torch.cuda.is_available():
        free += idle_pinned_bytes(torch.cuda.host_memory_stats())
    return max(int(HOST_SHARE * free), 0)


def idle_pinned_bytes(stats: dict[str, Any]) -> int:
    """What PyTorch keeps pinned for its next use; how that is counted has been renamed between its versions."""
    held = stats.get("reserved_bytes.current", stats.get("allocated_bytes.current", 0))
    used = stats.get("active_bytes.current", stats.get("allocated_bytes.current", held))
    return max(held - used, 0)


def free_device_bytes(device: torch.device) -> int:
    """Bytes of the GPU that no tensor holds, within what this process may take."""
    index = device.index or 0
    free, total = torch.cuda.mem_get_info(index)
    told = getattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 1.0)  # not in torch 2.11
    used = torch.cuda.memory_allocated(index)
    return max(min(free + torch.cuda.memory_reserved(index), int(total * told(index))) - used, 0)
