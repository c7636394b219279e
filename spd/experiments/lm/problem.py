"""A language model as a problem: its target, its text, and how to read both."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from spd.config import UserError
from spd.problem import Problem


@dataclass(frozen=True, kw_only=True)
class LMProblem(Problem):
    """A `Problem` whose batches are token ids `[batch, position]` and whose recon is `kl`.

    `target` maps such a batch to logits `[batch, position, vocab]`; its modules have the names that
    they have in the Hugging Face model.
    """

    tokenizer: PreTrainedTokenizerBase | None
    """None where the data came as token ids and names no tokenizer"""
    unembed: str | None
    """path of the module that makes logits of the residual stream; None: the model has none"""


def need_lm(problem: Problem, place: str) -> LMProblem:
    """The problem as what it must be for `place`, an entry of the configuration."""
    if not isinstance(problem, LMProblem):
        raise UserError(f"{place}: works on language models only; remove it")
    return problem
