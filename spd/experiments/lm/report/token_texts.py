"""Token ids as text that a reader can make something of."""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")
BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""the letters in which byte-level tokenizers write bytes"""
MOST_TOGETHER = 8
"""tokens that one character, or a chain of characters cut within, may be split into"""


class TokenTexts:
    """The text of each token that is shown, and the place of each in one list."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        self.place: dict[tuple[int, ...], int] = {}
        self.partial: dict[int, bool] = {}

    def __call__(self, *tokens: int) -> int:
        """The place of a token's text, or of that which tokens make together."""
        if tokens not in self.place:
            self.place[tokens] = len(self.texts)
            single = len(tokens) == 1
            text = token_text(self.tokenizer, tokens[0]) if single else self._decode(tokens)
            self.texts.append(text)
        return self.place[tokens]

    def whole(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """The tokens in their order; those that make a character, or characters, only together, as one."""
        groups, start = [], 0
        while start < len(tokens):
            end = start + 1
            if self._is_partial(tokens[start]):
                ends = range(start + 2, min(start + MOST_TOGETHER, len(tokens)) + 1)
                end = next((e for e in ends if self._is_text(tokens[start:e])), end)
            groups.append(tuple(tokens[start:end]))
            start = end
        return groups

    def _is_partial(self, token: int) -> bool:
        if token not in self.partial:
            self.partial[token] = self._known(token) and "\ufffd" in self._decode([token])
        return self.partial[token]

    def _is_text(self, tokens: Sequence[int]) -> bool:
        return all(map(self._known, tokens)) and "\ufffd" not in self._decode(tokens)

    def _known(self, token: int) -> bool:
        return self.tokenizer is not None and token < len(self.tokenizer)

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self.tokenizer is not None, "only what is known is decoded"
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def token_text(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    """A token as text, with the space that it begins with; `#7` where there is no text for it.

    Of a part of a character the bytes are given, as `<0xE2>`.
    """
    if tokenizer is None or token >= len(tokenizer):
        return f"#{token}"
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if "\ufffd" in text and all(letter in BYTE_OF for letter in piece):
        return _bytes_as_text(bytes(BYTE_OF[letter] for letter in piece))
    if "\ufffd" in text or not text:
        return piece
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text


def _bytes_as_text(raw: bytes) -> str:
    """The characters that are whole, and the other bytes as `<0xE2>`."""
    text = raw.decode("utf-8", errors="surrogateescape")
    return "".join(
        f"<0x{ord(letter) - 0xDC00:02X}>" if 0xDC80 <= ord(letter) <= 0xDCFF else letter
        for letter in text
    )


def readable_tokens(tokenizer: PreTrainedTokenizerBase | None, n: int) -> Bool[Tensor, " n"]:
    """Which of n token ids are text by themselves: no part of a character, no control character.

    Bytes that a tokenizer knows and no text has used make up most of such tokens; their vectors were
    never trained and would head every list. All, if none were left or there is no tokenizer.
    """
    if tokenizer is None:
        return torch.ones(n, dtype=torch.bool)
    texts = tokenizer.batch_decode([[token] for token in range(min(n, len(tokenizer)))])
    readable = torch.zeros(n, dtype=torch.bool)
    readable[: len(texts)] = torch.tensor(
        [text != "" and not NO_TEXT.search(text) for text in texts]
    )
    return readable if readable.any() else torch.ones(n, dtype=torch.bool)
