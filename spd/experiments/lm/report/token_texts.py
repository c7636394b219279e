"""Token ids as text that a reader can make something of."""

import re

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")


class TokenTexts:
    """The text of each token that is shown, and the place of each in one list."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        self.place: dict[int, int] = {}

    def __call__(self, token: int) -> int:
        if token not in self.place:
            self.place[token] = len(self.texts)
            self.texts.append(token_text(self.tokenizer, token))
        return self.place[token]


def token_text(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    """A token as text, with the space that it begins with; `#7` where there is no text for it."""
    if tokenizer is None or token >= len(tokenizer):
        return f"#{token}"
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if "\ufffd" in text or not text:  # it is a part of a character
        return piece
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text


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
