"""Train the demo base's tokenizer: SentencePiece BPE with the published tokenizer's kind of settings.

    python scripts/train_demo_tokenizer.py --corpus CORPUS --instructions DIR --out tnl/demo/base/tokenizer.model

CORPUS and DIR as in scripts/demo_corpus.py, whose weights and hold-outs it shares.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from demo_corpus import WEIGHTS, all_dialogues, held_out, read_corpus, read_instructions
from demo_dialogues import render

PIECES = 8000
CHARACTERS_A_SOURCE = 2_500_000


def lines(corpus: dict[str, list[str]], chats: dict[str, list], seed: int) -> Iterator[str]:
    """Lines of every source, at most CHARACTERS_A_SOURCE times its weight, so that no source decides the pieces alone."""
    rng = random.Random(seed)
    parts = {name: [text for text in texts if not held_out(text)] for name, texts in corpus.items() if name in WEIGHTS}
    parts |= {
        name: ["".join(prompt + answer for prompt, answer in render(dialogue)) for dialogue in found] for name, found in chats.items()
    }
    for name, documents in parts.items():
        rng.shuffle(documents)
        for _ in range(WEIGHTS[name]):
            budget = CHARACTERS_A_SOURCE
            for text in documents:
                yield from (line for line in text.split("\n") if line)
                budget -= len(text)
                if budget < 0:
                    break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    corpus = read_corpus(arguments.corpus)
    chats = all_dialogues(corpus, read_instructions(arguments.instructions), arguments.seed)
    with arguments.out.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(corpus, chats, arguments.seed),
            model_writer=model,
            model_type="bpe",
            vocab_size=PIECES,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            character_coverage=0.99,
            max_sentence_length=16_384,
            num_threads=2,
        )


if __name__ == "__main__":
    main()
