"""The published models' tokenizer: SentencePiece BPE with byte fallback and a dummy prefix, ids and text as published.

The published class (early 2024) does not load on transformers 5, so this one is our own, on sentencepiece alone.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from tnl.data.pieces import fields
from tnl.errors import ModelError

VOCAB_FILE = "tokenizer.model"

# What `tnl.data.template` encodes for the chatml template, as text: after an answer stands the end token, as in training.
CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' + message['content'] + eos_token }}"
    "{% elif message['role'] in ['system', 'user'] %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class BaiChuanTokenizer(SentencePieceBackend):
    """`tokenizer(text)` begins with `<s>` where add_bos_token is true, the published default; prompts for training and chat
    come from `tnl.data.template`, which never adds it.

    Pad is `<unk>` (id 0), never the end token: everything masks by length, not by id.
    Loads from a folder that holds tokenizer.model and nothing else. Raises ModelError where that file is missing or broken.
    """

    # transformers declares both as instance attributes
    vocab_files_names = {"vocab_file": VOCAB_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        chat_template: str | None = None,
        **settings: Any,
    ) -> None:
        if vocab_file is None:
            raise ModelError("", f"the tokenizer has no {VOCAB_FILE}", f"Give the folder that holds {VOCAB_FILE}.")
        check_model_file(Path(vocab_file))
        settings |= {name: plain(settings.get(name) or default) for name, default in SPECIAL_TOKENS.items()}
        pad = settings.get("pad_token")
        settings["pad_token"] = settings["unk_token"] if pad is None or str(pad) == str(settings["eos_token"]) else plain(pad)
        settings.setdefault("clean_up_tokenization_spaces", False)
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        # legacy: the dummy prefix is sentencepiece's own, as published
        settings["legacy"] = True
        super().__init__(
            vocab_file=vocab_file,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            chat_template=chat_template or CHATML,
            **settings,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **settings: Any) -> "BaiChuanTokenizer":
        """As transformers' own, but a local folder without tokenizer.model is refused by name."""
        folder = Path(pretrained_model_name_or_path) / str(settings.get("subfolder") or "")
        if folder.is_dir() and not (folder / VOCAB_FILE).is_file():
            raise ModelError(folder, f"{VOCAB_FILE} is missing", f"Download the folder again, or copy {VOCAB_FILE} from the base model.")
        return super().from_pretrained(pretrained_model_name_or_path, *inputs, **settings)

    def save_pretrained(self, save_directory: Any, *inputs: Any, **settings: Any) -> tuple[str, ...]:
        """As transformers' own, which forgets add_bos_token and add_eos_token and keeps an auto_map to code that is not there."""
        files = super().save_pretrained(save_directory, *inputs, **settings)
        prefix = settings.get("filename_prefix")
        path = Path(save_directory) / (f"{prefix}-tokenizer_config.json" if prefix else "tokenizer_config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("auto_map", "is_local", "local_files_only"):
            config.pop(key, None)
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        return files

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        bos, eos = self._edges()
        return bos + token_ids_0 + eos + ([] if token_ids_1 is None else bos + token_ids_1 + eos)

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return [int(i in self.all_special_ids) for i in token_ids_0]
        bos, eos = self._edges()
        mask = [1] * len(bos) + [0] * len(token_ids_0) + [1] * len(eos)
        return mask if token_ids_1 is None else mask + [1] * len(bos) + [0] * len(token_ids_1) + [1] * len(eos)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces. The published class's habit is kept: a blank before a run that ends in a special token."""
        special = set(self.all_special_tokens)
        text, run = "", []
        for i, token in enumerate(tokens):
            if token not in special:
                run.append(token)
                continue
            if i and tokens[i - 1] not in special:
                text += " "
            text += self.sp_model.decode(run) + token
            run = []
        return text + self.sp_model.decode(run)

    def _edges(self) -> tuple[list[int], list[int]]:
        return [self.bos_token_id] if self.add_bos_token else [], [self.eos_token_id] if self.add_eos_token else []


SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def plain(token: str | AddedToken) -> AddedToken:
    """The token without the published config's `single_word`, which transformers 4 ignored and 5 obeys (`</s>end` would be no </s>)."""
    return AddedToken(str(token), lstrip=False, rstrip=False, single_word=False, normalized=True, special=True)


def check_model_file(path: Path) -> None:
    """Refuse a tokenizer.model that is not whole: sentencepiece loads a file cut between two pieces, with other ids.

    A SentencePiece file is a protobuf: pieces (field 1), then the trainer's settings (2), then the normaliser's (3).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(path, f"cannot be read ({error.strerror})", "Download it again, or mend its permissions.") from error
    try:
        whole = {1, 2, 3} <= {number for number, _ in fields(data)}
    except ValueError:
        whole = False
    if not whole:
        todo = "Download it again; a git-lfs pointer is a text file of about 130 bytes."
        raise ModelError(path, f"is not a whole SentencePiece model (found {len(data):,} bytes)", todo)
