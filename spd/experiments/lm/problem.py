"""A language model as a problem: its target, its text, and how to read both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spd.config import UserError
from spd.engine.prepare import Prepared
from spd.experiments.lm.data.text import TextConfig
from spd.experiments.lm.data.tokens import beginning_with
from spd.experiments.lm.report.page import write_lm_report
from spd.experiments.lm.report.token_texts import TokenTexts, token_text
from spd.problem import Batch, Problem


@dataclass(frozen=True, kw_only=True)
class LMProblem(Problem):
    """A `Problem` whose batches are token ids `[batch, position]`; its recon is mostly `kl`.

    `target` maps such a batch to logits `[batch, position, vocab]`; its modules have the names that
    they have in the Hugging Face model.
    """

    tokenizer: PreTrainedTokenizerBase | None
    """None where the data came as token ids and names no tokenizer"""
    unembed: str | None
    """path of the module that makes logits of the residual stream; None: the model has none"""
    text: TextConfig | None = None
    """how text became the token ids of its batches; None: as the tokenizer does it by itself"""
    write_target: Callable[[Path], None] | None = None
    """writes target, tokenizer and held-out text into a new directory, from which a run loads them"""
    n_report_batches: int = 32
    """held-out batches that the report is made of, or what there is"""

    def save_target(self, directory: Path) -> None:
        if self.write_target is not None:
            self.write_target(directory)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text as the data have them: `bos` and `lowercase` are those of the data."""
        if self.tokenizer is None:
            raise UserError(f"{text!r} cannot be read: this target has no tokenizer; name one")
        if self.text is None:
            return self.tokenizer.encode(text)
        return beginning_with(text, self.text, self.tokenizer)

    @property
    def token_text(self) -> "TokenReader":
        """What makes text of a token, with the space that it begins with, and of several together."""
        return TokenReader(self.tokenizer)

    def cross_entropy(
        self, logits: Float[Tensor, "batch position vocab"], batch: Batch
    ) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]] | None:
        """Of each sequence, summed over the tokens that are scored, and how many these are."""
        if self.unembed is None or not isinstance(batch, Tensor):
            return None
        kept = torch.ones_like(batch, dtype=torch.bool)
        if self.position_weights is not None:
            kept = self.position_weights(batch) > 0
        scored = kept[:, :-1] & kept[:, 1:]
        errors = next_token_cross_entropy(logits, batch)
        return errors.where(scored, 0.0).sum(dim=1), scored.sum(dim=1)

    def write_report(self, run_dir: Path, prepared: Prepared, n_batches: int | None = None) -> Path:
        """The page with a browser of the subcomponents; see `spd.reports.report`."""
        return write_lm_report(
            run_dir,
            prepared,
            tokenizer=self.tokenizer,
            unembed=self.unembed,
            n_batches=n_batches or self.n_report_batches,
            at_least=n_batches or 1,
        )


class TokenReader:
    """Tokens as text, by a tokenizer; by their numbers without one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)

    def __call__(self, token: int) -> str:
        return token_text(self.tokenizer, token)

    def whole(self, tokens: Sequence[int]) -> list[tuple[str, int]]:
        """The pieces of text that tokens make, each with how many of them it takes.

        It is one, except where only several make a character.
        """
        groups = self._texts.whole(tokens)
        return [(self._texts.texts[self._texts(*group)], len(group)) for group in groups]


def next_token_cross_entropy(
    logits: Float[Tensor, "batch position vocab"], tokens: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch predicted"]:
    """−log p of every token but the first of each sequence, in nats; nothing crosses a border.

    Position i predicts token i + 1 of its own sequence, so the last position predicts nothing.
    """
    return F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")


def weights_without(
    tokens: Int[Tensor, "batch position"], excluded: Sequence[int]
) -> Float[Tensor, "batch position"]:
    """0 where one of the `excluded` stands, else one number, so that the mean is 1 (0 if none is left)."""
    kept = torch.ones_like(tokens, dtype=torch.bool)
    for token in excluded:
        kept = kept & (tokens != token)
    return kept * (kept.numel() / kept.sum().clamp(min=1))


def need_lm(problem: Problem, place: str) -> LMProblem:
    """The problem as what it must be for `place`, an entry of the configuration."""
    if not isinstance(problem, LMProblem):
        raise UserError(f"{place}: works on language models only; remove it")
    return problem
