"""How text and questions become tokens, with the fixed context as a common prefix whatever follows it.

Tokens can merge across the seam between the fixed text and a question ("." and a newline, say). The whole is therefore
tokenised as one string, and the last fixed tokens that came out differently are given up for that question: they lie in
the observation window, which can be shortened without touching any cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from squeezed.errors import InputError

_FIXED = "\u2063fixed-context\u2063"  # stands for the text while the template is rendered; no text contains it
_SEPARATOR = "\n\n"
Message = dict[str, str]


@dataclass(frozen=True)
class Seam:
    """What is needed to continue the fixed context at question time.

    Attributes:
        chat: the model's chat template wraps the text; otherwise the text is continued plainly.
        tail: the last characters of the prefix. Tokenising `tail` gives the prefix's last `tail_tokens`, so that a
            question never needs the whole text again.
        whole: `tail` is all of the prefix, so that the tokenizer's own special tokens belong in front.
    """

    chat: bool
    tail: str
    tail_tokens: tuple[int, ...]
    whole: bool


@dataclass(frozen=True)
class EncodedPrefix:
    """The fixed context in tokens: ids, the character span of each in `text`, and the seam."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    seam: Seam


def encode_prefix(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> tuple[EncodedPrefix, int]:
    """Tokenise the fixed context as it stands in every prompt.

    Args:
        text: the fixed text itself.
        chat: wrap it in the model's chat template.

    Returns:
        The prefix, and the number of characters that the template puts before the text.

    Raises:
        InputError: the tokenizer has no chat template, or one that does not keep the text as it is.
    """
    text = text.rstrip()
    head = before_text(tokenizer, chat)
    prefix = head + text
    encoded = tokenizer(prefix, add_special_tokens=not chat, return_offsets_mapping=True, verbose=False)
    ids, spans = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    for length in (64, 128, 256):
        if length >= len(ids):
            break
        tail = prefix[spans[-length][0] :]
        tokens = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
        if list(tokens) == ids[-length:]:
            return EncodedPrefix(prefix, ids, spans, Seam(chat, tail, tuple(tokens), whole=False)), len(head)
    return EncodedPrefix(prefix, ids, spans, Seam(chat, prefix, tuple(ids), whole=True)), len(head)


def before_text(tokenizer: PreTrainedTokenizerBase, chat: bool) -> str:
    """What the chat template puts before the fixed text; nothing where the text is continued plainly."""
    return _render(tokenizer, [{"role": "user", "content": _FIXED}])[0] if chat else ""


def continuation(tokenizer: PreTrainedTokenizerBase, seam: Seam, turns: Sequence[Message]) -> str:
    """What stands after the fixed text in the prompt: the first question, and all later turns.

    Args:
        turns: alternating user and assistant messages, {"role": ..., "content": ...}, the first from the user.

    Raises:
        InputError: a turn holds the words that stand for the text while the template is rendered.
    """
    if not seam.chat:
        return _SEPARATOR.join(turn["content"] for turn in turns)
    if any(_FIXED in turn["content"] for turn in turns):
        raise InputError(f"a question holds {_FIXED!r}, which marks the text's place; take the two U+2063 out")
    first = {"role": "user", "content": _FIXED + _SEPARATOR + turns[0]["content"]}
    return _render(tokenizer, [first, *turns[1:]])[1]


def encode_continuation(tokenizer: PreTrainedTokenizerBase, seam: Seam, rest: str) -> tuple[int, list[int]]:
    """Tokenise what follows the fixed context, as part of the whole string.

    Returns:
        How many of the fixed context's last tokens are not common to the whole, and the tokens after those in common.
    """
    whole = list(
        tokenizer(seam.tail + rest, add_special_tokens=seam.whole and not seam.chat, verbose=False)["input_ids"]
    )
    common = common_prefix(whole, seam.tail_tokens)
    if common == len(whole):  # nothing follows: feed the last token again
        common -= 1
    return len(seam.tail_tokens) - common, whole[common:]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that both share."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, str]:
    """The prompt before and after the place of the fixed text."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this model's tokenizer has no chat template; pass --raw to continue the text plainly")
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parts = prompt.split(_FIXED)
    if len(parts) != 2:
        raise InputError("this model's chat template does not keep the user's text as it is; build with --raw instead")
    return parts[0], parts[1]
