"""What `decoding.py` and `serving.py` hold against the references before they print a figure: each check returns what disagrees."""

from __future__ import annotations

from typing import Any

import torch
from random_model import in_memory, prompt, random_adapter
from torch import Tensor

from tnl.generate.adapters import Adapters
from tnl.generate.engine import Engine
from tnl.generate.request import Request, Ticket
from tnl.generate.sampling import Settings
from tnl.generate.slots import Wrap, forward, head, waiting_room
from tnl.kernels import draw
from tnl.kernels.deferred import EVERY
from tnl.kernels.lightning_step_gate import lightning_step_gate
from tnl.kernels.reference import Rows, recurrent_lightning_attention
from tnl.model.decay import log_decay
from tnl.model.load import load_model, load_tokenizer

LAYERS = 3
"""Of the models that are compared: the published widths, LRPE in the first."""


def greedy(tokens: int) -> Settings:
    return Settings(do_sample=False, max_new_tokens=tokens)


def all_of(engine: Engine, requests: list[Request]) -> list[Ticket]:
    """The requests, answered together."""
    tickets = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return tickets


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def held(name: str, value: float, bound: float) -> list[str]:
    """Print a measured error; a complaint where it is too large."""
    print(f"  {name}: {value:.1e}, at most {bound:.0e}", flush=True)
    return [] if value <= bound else [f"{name}: {value:.1e}"]


def decoded(engine: Engine, ids: Tensor, rows: Tensor | None = None) -> Tensor:
    """Logits [size, V] after the engine's own step has read ids [size, T] one by one, whatever it would have drawn.

    rows: the adapter of each slot.
    """
    steps: Any = engine.steps
    size = len(ids)
    for _ in range(size):
        engine.slots.take()
    columns = ids.T.contiguous()[..., None]
    with torch.inference_mode():
        key = steps._step(size, rows is not None)
        steps.control.zero_()
        steps.control[:size, draw.LIVE] = 1
        if rows is not None:
            steps.control[:size, draw.ADAPTER] = rows
        target = engine.slots.ids[:size]
        for column in columns:
            target.copy_(column)
            logits = steps.graphs.run(key)
    logits = logits.float().clone()
    for slot in range(size):
        engine.slots.release(slot)
    return logits


@torch.inference_mode()
def at_once(model: Any, ids: Tensor, wrap: Wrap | None = None, cut: int = 4096) -> Tensor:
    """Logits [B, V] after ids [B, T], read by the model's own forms; wrap: with adapters."""
    states: list[Tensor | None] = [None] * model.config.decoder_layers
    for start in range(0, ids.shape[1], cut):
        part = ids[:, start : start + cut]
        positions = torch.arange(start, start + part.shape[1], device=ids.device).expand(len(ids), -1)
        hidden, after = forward(model, part, states, Rows(positions), wrap)
        states = list(after)
    return head(model, hidden[:, -1])


class Forms:
    """One model of a few layers in three forms: the engine's in bfloat16, and the reference's in float32 and bfloat16."""

    def __init__(self, size: str, device: str, tokenizer: Any) -> None:
        self.device, self.tokenizer = device, tokenizer
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.ours = in_memory(size, device, dtype, layers=LAYERS, backend="triton")
        self.exact = in_memory(size, device, torch.float32, layers=LAYERS, backend="reference")
        self.plain = in_memory(size, device, dtype, layers=LAYERS, backend="reference")
        self.exact.load_state_dict({name: value.float() for name, value in self.ours.state_dict().items()})
        self.plain.load_state_dict(self.ours.state_dict())

    def slots(self, counts: tuple[int, ...], writes: str = "each-step", tokens: int = 12) -> list[str]:
        """Logits after decoding steps of so many slots."""
        engine = Engine(self.ours, self.tokenizer, slots=max(counts), prefix_bytes=0, state_writes=writes)
        complaints = []
        for count in counts:
            ids = torch.randint(3, self.ours.config.vocab_size, (count, tokens), device=self.device)
            expected = at_once(self.exact, ids)
            drift = error(at_once(self.plain, ids), expected)
            found = error(decoded(engine, ids), expected)
            complaints += held(
                f"logits of {count} slots after {tokens} tokens, {writes} (the reference form in that dtype: {drift:.1e})", found, 3e-2
            )
        return complaints

    def adapters(self, counts: tuple[int, ...]) -> list[str]:
        """Logits of so many slots of which each has one of three adapters, or none."""
        banks = [Adapters(model) for model in (self.ours, self.exact)]
        for seed in range(3):
            keys = [bank.add(random_adapter(self.ours, seed)) for bank in banks]
        engine = Engine(self.ours, self.tokenizer, adapters=banks[0], slots=max(counts), prefix_bytes=0, state_writes="each-step")
        complaints = []
        for count in counts:
            ids = torch.randint(3, self.ours.config.vocab_size, (count, 12), device=self.device)
            rows = (torch.arange(count, device=self.device) + banks[0].row(keys[0])) % 4
            expected = at_once(self.exact, ids, banks[1].wrap(rows))
            apart = error(at_once(self.exact, ids), expected)
            found = error(decoded(engine, ids, rows), expected)
            complaints += held(f"logits of {count} slots with adapters (without them: {apart:.1e})", found, 3e-2)
        return complaints

    def prompts(self, lengths: tuple[int, ...]) -> list[str]:
        """Logits after prompts, read by chunks."""
        engine, complaints = Engine(self.ours, self.tokenizer, slots=1, prefix_bytes=0), []
        for length in lengths:
            ids = torch.randint(3, self.ours.config.vocab_size, (1, length), device=self.device)
            states = engine.steps.begin(None, None)
            with torch.inference_mode():
                for start in range(0, length, engine.chunk):
                    logits, states = engine.steps.read(ids[0, start : start + engine.chunk].tolist(), states, start, 0)
            complaints += held(f"logits after a prompt of {length}", error(logits.float(), at_once(self.exact, ids)), 3e-2)
        return complaints


def far(device: str, writes: str = "each-step", tokens: int = 32768) -> list[str]:
    """32k tokens decoded one by one against one float64 pass of the bundled demo model."""
    exact, complaints = load_model("demo", device=device, dtype="float64", backend="reference"), []
    ids = torch.randint(3, exact.config.vocab_size, (1, tokens), device=device)
    expected = at_once(exact, ids)
    for dtype, bound in (("float32", 1e-3), ("bfloat16", 5e-2)):
        model = load_model("demo", device=device, dtype=dtype, backend="triton")
        found = error(decoded(Engine(model, load_tokenizer("demo"), slots=8, prefix_bytes=0, state_writes=writes), ids), expected)
        complaints += held(f"logits after {tokens} decoded tokens, {dtype}, {writes}", found, bound)
    return complaints


def texts(device: str, writes: str = "each-step") -> list[str]:
    """What the demo model says in full batches, against the float32 reference on the CPU."""
    tokenizer = load_tokenizer("demo")
    ours = Engine(load_model("demo", device=device, dtype="float32", backend="triton"), tokenizer, slots=16, state_writes=writes)
    theirs = Engine(load_model("demo", device="cpu", dtype="float32"), tokenizer, slots=16)
    requests = [Request(prompt(3 + 17 * i, i), greedy(24)) for i in range(16)]
    requests += [Request(prompt(40, i), Settings(max_new_tokens=24, temperature=0.8, top_p=0.9, top_k=50), seed=i) for i in range(8)]
    found, expected = (all_of(engine, requests) for engine in (ours, theirs))
    alike = sum(mine.answers[0].ids == other.answers[0].ids for mine, other in zip(found, expected))
    print(f"  texts equal to the reference's: {alike} of {len(requests)}", flush=True)
    # two best tokens closer than float32's rounding may change places
    return [] if alike >= len(requests) - 1 else [f"{len(requests) - alike} texts differ from the reference's"]


def output_error(device: str, outputs: list[float], tokens: int = 32768) -> list[str]:
    """Attention outputs at the end of 32k tokens of one 7B layer's shape, the first's, a middle one's and the last's decays: the kernel
    that writes every 24th token in bfloat16 against float64. The largest error of a head is appended to `outputs`."""
    H, V, complaints = 32, 128, []
    for layer in (0, 15, 29):
        g = log_decay(H, layer, 30).to(device)
        draw = torch.Generator(device).manual_seed(layer)
        qkvu = torch.randn(tokens, 4 * H * V, device=device, generator=draw, dtype=torch.float32).to(torch.bfloat16)
        q, k, v = (part.double().view(1, tokens, H, V) for part in qkvu[:, : 3 * H * V].split(H * V, 1))
        q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
        state = torch.zeros(1, H, V, V, device=device)
        deferred = waiting_room(state, torch.bfloat16)
        live, waiting = torch.ones(1, device=device), torch.arange(EVERY, device=device)[:, None]
        found = []
        for t in range(tokens):
            values, _ = lightning_step_gate(qkvu[t : t + 1], deferred._replace(waiting=waiting[t % EVERY]), g, live, gate=False)
            if t >= tokens - 64:
                found.append(values.view(H, V))
        # of the last 64 outputs: what stands before them is one sum
        last, ago = slice(tokens - 64, tokens), torch.arange(tokens - 64, device=device).flip(0)
        weight = torch.exp(g.double()[:, None] * ago)  # [H, T - 64]
        before = torch.einsum("thk,ht,thv->hkv", k[0, : tokens - 64], weight, v[0, : tokens - 64])[None]
        expected, _ = recurrent_lightning_attention(q[:, last], k[:, last], v[:, last], g.double(), initial_state=before)
        o = torch.stack(found).double()
        worst = float(((o - expected[0]).norm(dim=(0, 2)) / expected[0].norm(dim=(0, 2))).max())
        outputs.append(worst)
        complaints += held(f"attention outputs after {tokens} tokens, decays of layer {layer} of 30", worst, 3e-3)
    return complaints
