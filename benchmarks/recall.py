"""A fact from far back must be named at the end: learned with streaming, not with truncation.

    python benchmarks/recall.py --distance 50000 --out recall.json

A document opens with one fact for each of 4 subjects, goes on with random filler, and ends with the 4 questions in random order,
whose answers alone are learned. The right ones stand before the filler and nowhere else, so guessing costs log 4 = 1.386 nats. The
filler is 64 tokens long for a while, then grows by a constant factor a step to `distance`, and stays there for the last steps.
Three ways to train the same small model on the same documents, in segments of the same length:

- streamed: train/long_sequence.py, the gradients of full backpropagation through time;
- state carried: a segment starts from the state before it, but no gradient goes back over its edge (truncated backpropagation);
- truncated: the document's last segment alone, as data.max_length would cut it.

With --segment 32 no question ever shares a segment with its fact: then the gradient over the edges is what is learned from.
Runs on two CPU cores in half an hour. Prints each way's loss curve and, on new documents of the full distance, its loss and the
share of right answers; --out writes them as JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tnl.kernels.linear_cross_entropy import linear_cross_entropy
from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.state import TransnormerCache
from tnl.model.stream import hidden_states, token_losses
from tnl.train.long_sequence import cut, streamed_backward, targets_of

SUBJECTS, VALUES, FILLER = 4, 4, 8
QUESTION = SUBJECTS * VALUES
ANSWER = QUESTION + SUBJECTS
OTHER = ANSWER + VALUES
VOCABULARY = OTHER + FILLER
SHORTEST = 64
DOCUMENTS = 4  # a step
TESTED = 25
Batch = dict[str, Tensor]


def make_model() -> TransnormerForCausalLM:
    """Two layers: the last one hardly decays, as in the published models."""
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=VOCABULARY,
        decoder_embed_dim=64,
        hidden_dim=64,
        decoder_layers=2,
        decoder_attention_heads=2,
        glu_dim=64,
        tie_word_embeddings=False,
        init_std=0.1,
    )
    return TransnormerForCausalLM(config).train()


def document(distance: int, generator: torch.Generator) -> Batch:
    """input_ids and labels [1, T]: facts, filler, questions and answers."""
    values = torch.randint(VALUES, (SUBJECTS,), generator=generator)
    told, asked = (torch.randperm(SUBJECTS, generator=generator) for _ in range(2))
    filler = OTHER + torch.randint(FILLER, (distance,), generator=generator)
    ends = torch.stack([QUESTION + asked, ANSWER + values[asked]], 1).flatten()
    ids = torch.cat([told * VALUES + values[told], filler, ends])
    labels = torch.full_like(ids, -100)
    labels[1 - 2 * SUBJECTS :: 2] = ids[1 - 2 * SUBJECTS :: 2]
    return {"input_ids": ids[None], "labels": labels[None]}


def distance_at(step: int, steps: int, farthest: int) -> int:
    """Filler tokens of a step's documents."""
    share = (step / steps - 0.3) / 0.6
    return round(SHORTEST * (farthest / SHORTEST) ** min(max(share, 0.0), 1.0))


def rate_at(step: int, steps: int) -> float:
    """The step size falls while the filler grows: the more of it there is, the more exactly it must be left out of the state."""
    return 3e-3 * 0.05 ** min(max((step / steps - 0.3) / 0.7, 0.0), 1.0)


def streamed(model: TransnormerForCausalLM, batch: Batch, segment: int) -> Tensor:
    return streamed_backward(model, batch, segment, lambda x, t: linear_cross_entropy(x, model.lm_head.weight, t), supervised=SUBJECTS)


def state_carried(model: TransnormerForCausalLM, batch: Batch, segment: int) -> Tensor:
    cache, total = TransnormerCache(len(model.model.layers)), torch.zeros(())
    for part in cut(batch, segment):
        cache.states = [None if state is None else state.detach() for state in cache.states]
        with torch.set_grad_enabled(part.learned):
            hidden = model.model(batch["input_ids"][:, part.start : part.stop], past_key_values=cache, use_cache=True).last_hidden_state[0]
        if part.learned:
            index, targets = targets_of(batch, part.start, part.stop)
            loss = linear_cross_entropy(hidden[index], model.lm_head.weight, targets) / SUBJECTS
            loss.backward()
            total = total + loss.detach()
    return total


def truncated(model: TransnormerForCausalLM, batch: Batch, segment: int) -> Tensor:
    return streamed(model, {name: x[:, -segment:] for name, x in batch.items()}, segment)


WAYS: dict[str, Callable[[TransnormerForCausalLM, Batch, int], Tensor]] = {
    "streamed": streamed,
    "state carried": state_carried,
    "truncated": truncated,
}


def test(model: TransnormerForCausalLM, distance: int, last: int | None) -> dict[str, float]:
    """Loss and share of right answers on new documents; with `last` only so many tokens at the end are read."""
    generator, loss, right = torch.Generator().manual_seed(2), 0.0, 0.0
    for _ in range(TESTED):
        batch = {name: x[0, -(last or 0) :] for name, x in document(distance, generator).items()}
        loss += sum(float(part.sum()) for _, part in token_losses(model, batch["input_ids"], batch["labels"])) / SUBJECTS
        parts = hidden_states(model, batch["input_ids"])
        ends = torch.cat([hidden[-2 * SUBJECTS :] for _, hidden in parts])[-2 * SUBJECTS :]  # questions may lie over an edge
        right += float((model.lm_head(ends[::2]).argmax(-1) == batch["input_ids"][1 - 2 * SUBJECTS :: 2]).float().mean())
    return {"loss": round(loss / TESTED, 4), "right": round(right / TESTED, 3)}


def train(way: str, steps: int, distance: int, segment: int) -> dict[str, object]:
    """Train one way; returns its curve."""
    model, generator = make_model(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    start, curve = time.monotonic(), []
    for step in range(steps):
        now, loss = distance_at(step, steps, distance), 0.0
        for _ in range(DOCUMENTS):
            loss += float(WAYS[way](model, document(now, generator), segment)) / DOCUMENTS
        optimizer.param_groups[0]["lr"] = rate_at(step, steps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append({"step": step, "distance": now, "loss": round(loss, 4)})
        if step % 20 == 0 or step == steps - 1:
            recent = sum(line["loss"] for line in curve[-20:]) / len(curve[-20:])
            print(f"{way:>14} step {step:4} distance {now:6,} loss {recent:.3f} ({time.monotonic() - start:.0f} s)", flush=True)
    return {"way": way, "curve": curve, "test": test(model.eval(), distance, segment if way == "truncated" else None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distance", type=int, default=50_000)
    parser.add_argument("--segment", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    runs = [train(way, arguments.steps, arguments.distance, arguments.segment) for way in arguments.ways]
    for run in runs:
        print(f"{run['way']}: {TESTED} new documents of {arguments.distance:,} tokens: {run['test']}")
    if arguments.out:
        arguments.out.write_text(json.dumps(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
