"""From a request's words to ids, by the same template that training uses; what a client may not put there is named."""

from tnl.data.guard import encode_whole
from tnl.data.messages import Message, Role
from tnl.data.template import encode_prompt
from tnl.model.tokenization_baichuan import BaiChuanTokenizer
from tnl.serve.catalog import Served
from tnl.serve.errors import ApiError
from tnl.serve.schema import ChatRequest, CompletionRequest

MARKERS = 256
"""How often the words that a template opens turns with may stand in a request: each has to be spelled anew."""
CHARACTERS = 16
"""Characters that a token has at most on average: a text of more is over the limit of tokens without being read."""


def chat_ids(wanted: ChatRequest, served: Served, tokenizer: BaiChuanTokenizer, most: int, param: str = "messages") -> tuple[int, ...]:
    """The ids that ask for the next answer, at most so many. Raises ApiError 400."""
    said = wanted.messages
    for i, message in enumerate(said):
        where = param if param != "messages" else f"messages[{i}].content"
        if message.role == "system" and i:
            raise ApiError(400, f"messages[{i}].role: a system message stands first or nowhere", param=f"messages[{i}].role")
        if sum(message.content.count(marker) for marker in served.template.markers) > MARKERS:
            raise ApiError(400, f"{where}: it holds the words that open a turn more than {MARKERS} times", param=where)
    if said[-1].role != "user":
        raise ApiError(400, "messages: the last one needs to be the user's", param=f"messages[{len(said) - 1}].role")
    check_characters(sum(len(message.content) for message in said), most, param)
    turns = [Message(Role(message.role), message.content) for message in said]
    ids = tuple(encode_prompt(turns, tokenizer, served.template, system=served.system))
    return checked(ids, most, param)


def prompt_ids(wanted: CompletionRequest, tokenizer: BaiChuanTokenizer, most: int) -> list[tuple[int, ...]]:
    """The ids of each prompt, at most so many. Raises ApiError 400."""
    given = wanted.prompt
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    found = []
    for i, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
        if isinstance(prompt, str):
            check_characters(len(prompt), most, where)
            ids = tuple(encode_whole(tokenizer.sp_model, prompt))
        else:
            ids = tuple(prompt)  # type: ignore[arg-type]
            if max(ids) >= len(tokenizer):
                raise ApiError(400, f"{where}: ids are below {len(tokenizer)} here", param=where)
        found.append(checked(ids, most, where))
    return found


def check_characters(characters: int, most: int, param: str) -> None:
    """Refuse at once what cannot fit in so many tokens."""
    if characters > most * CHARACTERS:
        raise ApiError(400, f"{param}: it has more than {most * CHARACTERS:,} characters", param=param)


def checked(ids: tuple[int, ...], most: int, param: str) -> tuple[int, ...]:
    """The ids, of which there are some and not too many."""
    if not ids or len(ids) > most:
        raise ApiError(400, f"{param}: a prompt has 1 to {most:,} tokens here (found {len(ids):,})", param=param)
    return ids
