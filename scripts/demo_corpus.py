"""The text that the demo base is pretrained on: sources, weights, what is held out, and the token shards.

    python scripts/demo_corpus.py --corpus CORPUS --instructions DIR --tokenizer tnl/demo/base/tokenizer.model --out .pretrain

CORPUS holds one {"text": ...} document a line in NAME.jsonl.xz; DIR holds alpaca_zh_demo.json and alpaca_en_demo.json (Apache-2.0).
Every fiftieth document, by a hash of its text, is held out of training and of the dialogues. scripts/pretrain_demo.py reads the shards.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from demo_dialogues import Dialogue, dialogues, render

# How often an epoch reads a source: prose and law twice, verse once, and twice more what the persona will lean on.
WEIGHTS = {
    "zh_sanguo": 4,
    "zh_bible_cuv": 2,
    "zh_china_law": 1,
    "zh_poetry_core": 1,
    "zh_poetry_song": 1,
    "zh_poet_lives": 1,
    "en_bible_kjv": 1,
    "en_austen": 1,
    "en_stdlib_books": 1,
    "en_wordnet": 1,
    "zh_dialogues": 2,
    "en_dialogues": 1,
}
HELD_OUT_ONE_IN = 50
BOS, EOS = 1, 2


def held_out(text: str) -> bool:
    return zlib.crc32(text.encode("utf-8")) % HELD_OUT_ONE_IN == 0


def read_corpus(folder: Path) -> dict[str, list[str]]:
    """Source -> its documents, in the order of the files."""
    corpus = {}
    for path in sorted(folder.glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            corpus[path.name.removesuffix(".jsonl.xz")] = [json.loads(line)["text"] for line in lines]
    return corpus


def read_instructions(folder: Path) -> dict[str, list[Dialogue]]:
    """Alpaca's records as dialogues of one turn: language -> dialogues."""
    found = {}
    for language in ("zh", "en"):
        records = json.loads((folder / f"alpaca_{language}_demo.json").read_text(encoding="utf-8"))
        asked = [(r["instruction"] + ("\n" + r["input"] if r["input"] else ""), r["output"]) for r in records]
        found[language] = [Dialogue(None, [pair]) for pair in asked]
    return found


def all_dialogues(corpus: dict[str, list[str]], instructions: dict[str, list[Dialogue]], seed: int) -> dict[str, list[Dialogue]]:
    """What is written in ChatML, by source name: the instruction sets, and what demo_dialogues makes of documents not held out."""
    kept = {name: [text for text in texts if not held_out(text)] for name, texts in corpus.items()}
    made = dialogues(kept, random.Random(seed))
    return {f"{language}_dialogues": instructions[language] * 2 + made[language] for language in ("zh", "en")}


def encode_dialogue(dialogue: Dialogue, tokenizer: sentencepiece.SentencePieceProcessor) -> list[int]:
    """The ids that chat and training use: prompt and answer are tokenised apart, each answer ends in </s>."""
    ids = []
    for prompt, answer in render(dialogue):
        ids += [*tokenizer.encode(prompt), *tokenizer.encode(answer), EOS]
    return ids


def encode_documents(
    corpus: dict[str, list[str]], chats: dict[str, list[Dialogue]], tokenizer: sentencepiece.SentencePieceProcessor
) -> Iterator[tuple[str, bool, list[list[int]]]]:
    """(source, held out or not, documents as ids) for every source."""
    for name, texts in corpus.items():
        if name not in WEIGHTS:
            continue
        parts: tuple[list[str], list[str]] = ([], [])
        for text in texts:
            parts[held_out(text)].append(text)
        for is_held_out, part in zip((False, True), parts):
            yield name, is_held_out, [[BOS, *ids, EOS] for ids in tokenizer.encode(part)]
    for name, found in chats.items():
        # Half begin with <s>, as tokenizer(text) writes them; half without, as the chat template does.
        encoded = [[BOS] * (i % 2) + encode_dialogue(dialogue, tokenizer) for i, dialogue in enumerate(found)]
        outside = [held_out(dialogue.turns[0][0]) for dialogue in found]
        for is_held_out in (False, True):
            yield name, is_held_out, [ids for ids, out in zip(encoded, outside) if out == is_held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(arguments.tokenizer))
    corpus = read_corpus(arguments.corpus)
    chats = all_dialogues(corpus, read_instructions(arguments.instructions), arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, is_held_out, documents in encode_documents(corpus, chats, tokenizer):
        if not documents:
            continue
        tokens = np.concatenate([np.asarray(ids, dtype=np.uint16) for ids in documents])
        lengths = np.asarray([len(ids) for ids in documents], dtype=np.int32)
        path = arguments.out / f"{name}.{'eval' if is_held_out else 'train'}.npz"
        np.savez_compressed(path, tokens=tokens, lengths=lengths)
        total += path.stat().st_size
        print(f"{path.name:32} {len(documents):8,} documents {len(tokens):12,} tokens {path.stat().st_size / 1e6:6.1f} MB")
    print(f"{total / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
