"""The texts that travel with the demo: 100,000 tokens of the Three Kingdoms to read, what its base is measured on, what it rehearses.

    python scripts/demo_package_data.py --corpus CORPUS --tokenizer tnl/demo/base/tokenizer.model --out tnl/demo

All public domain (see tnl/demo/base/README.md). The measured text is held out of pretraining and of the rehearsal.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from pathlib import Path

import sentencepiece
from demo_corpus import WEIGHTS, held_out, read_corpus

READ_TOKENS = 100_000
MEASURED_TOKENS_A_SOURCE = 1_000
REHEARSED_A_SOURCE, REHEARSED_TOKENS = 10, 120


def chapters(texts: list[str], tokenizer: sentencepiece.SentencePieceProcessor) -> str:
    """The novel from its beginning, whole chapters, until READ_TOKENS are reached."""
    taken, tokens = [], 0
    for text in texts:
        if tokens >= READ_TOKENS:
            break
        taken.append(text)
        tokens += len(tokenizer.encode(text + "\n"))
    return "\n".join(taken)


def excerpts(texts: list[str], tokenizer: sentencepiece.SentencePieceProcessor, count: int, tokens: int, rng: random.Random) -> list[str]:
    """`count` excerpts of about `tokens` tokens, each of whole lines, from different documents."""
    found = []
    for text in rng.sample(texts, len(texts)):
        lines = text.split("\n")
        start = rng.randrange(max(1, len(lines) // 2)) if len(text) > 1000 else 0
        ids = tokenizer.encode("\n".join(lines[start:]))[:tokens]
        found.append(tokenizer.decode(ids).rstrip("\ufffd"))
        if len(found) == count:
            break
    return found


def write_records(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(arguments.tokenizer))
    corpus = {name: texts for name, texts in read_corpus(arguments.corpus).items() if name in WEIGHTS}
    with lzma.open(arguments.out / "three-kingdoms.txt.xz", "wt", encoding="utf-8", preset=9) as file:
        file.write(chapters(corpus["zh_sanguo"], tokenizer))
    measured, rehearsed = [], []
    for texts in corpus.values():
        outside = [text for text in texts if held_out(text)]
        short = sum(map(len, outside)) / len(outside) < 300
        count, tokens = (12, MEASURED_TOKENS_A_SOURCE // 12) if short else (2, MEASURED_TOKENS_A_SOURCE // 2)
        measured += excerpts(outside, tokenizer, count, tokens, rng)
        rehearsed += excerpts([text for text in texts if not held_out(text)], tokenizer, REHEARSED_A_SOURCE, REHEARSED_TOKENS, rng)
    write_records(arguments.out / "held_out.jsonl", measured)
    write_records(arguments.out / "rehearsal.jsonl", rehearsed)


if __name__ == "__main__":
    main()
