"""CUDA graphs: thousands of launches become one, a graph for each shape."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Graphs:
    """CUDA graphs of functions of static tensors; elsewhere than on a GPU the functions are just called.

    One stream and one memory pool for all: they run one after another, so that they may share what they work in. What a function does
    has to do no harm when it is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known: dict[tuple[Any, ...], tuple[Callable[[], Any], Tensor]] = {}
        """Key -> how to run it, and where its result is."""
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()

    def run(self, key: tuple[Any, ...]) -> Tensor:
        """Run what `prepare` has recorded under the key."""
        replay, out = self.known[key]
        found = replay()
        return out if found is None else found

    def prepare(self, key: tuple[Any, ...], body: Callable[[], Tensor], *, warm: bool = False) -> None:
        """Record the function: run twice before, unless it is warm already, since kernels are compiled and chosen then."""
        if key in self.known:
            return
        if self.device.type != "cuda":
            self.known[key] = body, torch.empty(0)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for _ in range(0 if warm else 2):
                body()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # other threads (loading an adapter) may allocate meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            out = body()
        self.known[key] = graph.replay, out
