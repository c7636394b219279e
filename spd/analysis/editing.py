"""python -m spd.analysis.editing RUN_DIR SITE:C … --scale M | --remove | --rewrite TOKEN: edit the target.

The subcomponents named are scaled, removed, or made to write a token instead; all else of the matrices
stays, whatever the decomposition leaves over of them included. Told are the effect that was wanted, as it
was predicted and as it is measured, what else changes near by and far away, and the same for random
subcomponents in their place. --save writes the edited model (VPD paper, Bushnaq et al. 2026).
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from spd.analysis.edits import (
    Edit,
    Effect,
    Members,
    activation_signs,
    edited_matrices,
    effect_of,
    ever_on,
    random_members,
    rewritten,
    scaled,
)
from spd.components import input_output_weight
from spd.config import UserError, shown
from spd.run_files import read_json, write_json
from spd.runs.cli import add_ways_in
from spd.runs.console import console_log, user_errors
from spd.runs.export import export
from spd.runs.run import Run, load_run

ANALYSIS = "analysis/editing"
N_RANDOM = 5


class Wish(NamedTuple):
    """What is to become of the subcomponents."""

    factor: float | None = None
    """by which U is multiplied"""
    token: int | None = None
    """that they are to write instead, or the output"""
    alpha: float = 1.0
    """how much of it"""

    @property
    def words(self) -> str:
        if self.token is not None:
            return f"rewrite, α {self.alpha:g}"
        return "remove" if self.factor == 0 else f"scale by {self.factor:g}"


class Edited(NamedTuple):
    """One edit beside the same of random subcomponents."""

    wish: Wish
    edit: Edit
    effect: Effect
    random: list[Effect]
    """each with as many others of the same sites"""


@runtime_checkable
class HasTokens(Protocol):
    """A problem whose target makes logits of a residual stream, and knows the text of tokens."""

    @property
    def unembed(self) -> str | None: ...
    @property
    def tokenizer(self) -> Any: ...


def edited(
    run: Run, members: Members, wish: Wish, *, wanted: int | None = None, n_random: int = N_RANDOM
) -> Edited:
    """An edit of a run's target and its effect on the held-out batches."""
    model, problem, batches = run.model, run.problem, run.prepared.eval_batches
    wanted = wish.token if wanted is None else wanted
    edit = edit_of(run, members, wish)
    effect = effect_of(model, problem, edit, batches, wanted=wanted)
    alive = ever_on(model, batches) if n_random else {}
    others = []
    for seed in range(n_random):
        chosen = random_members(model, members, alive, seed)
        own = edit_of(run, chosen, wish)
        others.append(effect_of(model, problem, own, batches, wanted=wanted))
    return Edited(wish, edit, effect, others)


def edit_of(run: Run, members: Members, wish: Wish) -> Edit:
    """The edit that is wished for, of these subcomponents."""
    model = run.model
    if wish.token is None:
        assert wish.factor is not None, "a wish is a factor or a token"
        return scaled(model, members, wish.factor)
    signs = activation_signs(model, members, run.prepared.eval_batches)
    return rewritten(model, members, direction_of(run, members, wish.token), wish.alpha, signs)


def direction_of(run: Run, members: Members, output: int) -> Float[Tensor, " d_out"]:
    """What writes an output: its column of the unembedding, or itself where the sites write it."""
    problem = run.problem
    if isinstance(problem, HasTokens) and problem.unembed is not None:
        head = input_output_weight(_plain(run.model.target.get_submodule(problem.unembed)))
        _check_output(output, head.shape[1])
        return head[:, output].detach()
    widths = {run.model.sites[path].subcomponents.U.shape[1] for path in members}
    n_outputs = _n_outputs(run)
    if widths != {n_outputs}:
        raise UserError(
            f"--rewrite: the sites write vectors of {', '.join(map(str, sorted(widths)))} entries, which"
            f" are not the {n_outputs} outputs, and the target has no unembedding that says how to"
            " write one"
        )
    _check_output(output, n_outputs)
    return torch.eye(n_outputs, device=next(run.model.target.parameters()).device)[output]


def _plain(module: torch.nn.Module) -> torch.nn.Module:
    original = getattr(module, "original", None)  # of an unembedding that is a site itself
    return original if isinstance(original, torch.nn.Module) else module


@torch.no_grad()
def _n_outputs(run: Run) -> int:
    return run.model(run.prepared.eval_batches[0], {}).shape[-1]


def _check_output(output: int, n: int) -> None:
    if not 0 <= output < n:
        raise UserError(f"output {output}: the target has the outputs 0 to {n - 1}")


def save(run: Run, edit: Edit, folder: str | Path) -> Path:
    """The edited model in the ordinary form of its kind: see `spd.export`."""
    return export(run, folder, "edited", edits=edited_matrices(run.model, edit))


# --- the command -----------------------------------------------------------------------------------


def read_members(words: Sequence[str], file: Path | None) -> dict[str, list[int]]:
    """`SITE:C` each, and a JSON file with a list of [site, c], as a cluster has it."""
    pairs: list[tuple[str, int]] = []
    for word in words:
        found = re.fullmatch(r"(.+):(\d+)", word)
        if found is None:
            raise UserError(f"{shown(word)}: a subcomponent is named SITE:C, for example linear1:3")
        pairs.append((found[1], int(found[2])))
    listed = read_json(file) if file is not None else []
    for item in listed if isinstance(listed, list) else [listed]:
        match item:
            case [str() as path, int() as c] if not isinstance(c, bool):
                pairs.append((path, c))
            case _:
                raise UserError(f"{file}: a list of [site, c] is needed, found {shown(item)}")
    members: dict[str, list[int]] = {}
    for path, c in pairs:
        members.setdefault(path, []).append(c)
    return members


def output_named(run: Run, name: str) -> int:
    """The index of an output: a number, or the one token of a text."""
    problem = run.problem
    tokenizer = problem.tokenizer if isinstance(problem, HasTokens) else None
    if tokenizer is not None:
        ids = tokenizer.encode(name, add_special_tokens=False)
        if len(ids) == 1:
            return ids[0]
        if not name.isdigit():
            raise UserError(
                f"{name!r} is {len(ids)} tokens ({', '.join(map(str, ids))}); the text of one, with its"
                " space, or its id is needed"
            )
    if not name.isdigit():
        raise UserError(f"{name!r}: the number of an output is needed")
    return int(name)


def lines(found: Sequence[Edited], *, of_tokens: bool) -> list[str]:
    """A line for each edit, and under it the mean of the random ones."""
    wanted = "p" if of_tokens else "output"
    heads: tuple[str, ...] = ("edit", "on", f"{wanted} before", "after", "predicted", "measured")
    rows: list[tuple[str, ...]] = [(*heads, "D there", "near", "elsewhere")]
    for own in found:
        rows.append(_cells(own.wish.words, own.effect))
        if own.random:
            rows.append(_cells(f"  random (mean of {len(own.random)})", _mean(own.random)))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _cells(words: str, effect: Effect) -> tuple[str, ...]:
    numbers = effect._asdict()
    n = numbers.pop("n_on")
    kept = ("near", "at", "far")
    forms = {key: ".3g" if key in kept else ".4f" for key in numbers}
    cells = ["–" if value is None else f"{value:{forms[key]}}" for key, value in numbers.items()]
    return (words, f"{n:,.0f}", *cells)


def _mean(effects: Sequence[Effect]) -> Effect:
    """Of each figure that all of them have."""
    values = {}
    for name in Effect._fields:
        own = [value for effect in effects if (value := getattr(effect, name)) is not None]
        values[name] = sum(own) / len(own) if own else None
    return Effect(**values)


def record(run: Run, found: Sequence[Edited], wanted: int | None) -> dict[str, Any]:
    """Everything, for a JSON file."""
    edits = [
        {
            "edit": own.wish.words,
            **own.wish._asdict(),
            "effect": own.effect._asdict(),
            "random": [effect._asdict() for effect in own.random],
        }
        for own in found
    ]
    members = [[path, c] for path, cs in found[0].edit.members.items() for c in cs]
    return {"checkpoint": run.step, "members": members, "wanted": wanted, "edits": edits}


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("members", nargs="*", metavar="SITE:C", help="the subcomponents to edit")
    parser.add_argument(
        "--members", dest="file", type=Path, metavar="FILE", help="a JSON list of [site, c], too"
    )
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--scale", type=float, metavar="M", help="multiply what they write")
    ways.add_argument("--remove", action="store_true", help="--scale 0")
    ways.add_argument("--rewrite", metavar="TOKEN", help="write this token (or output) instead")
    parser.add_argument(
        "--alpha", type=float, nargs="+", default=[1.0], help="how much of it: one or several"
    )
    parser.add_argument("--wanted", metavar="TOKEN", help="whose probability (or output) is told")
    parser.add_argument("--random", type=int, default=N_RANDOM, metavar="N", help="random edits")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the edited model there")
    parser.add_argument("--name", default="edits", help="of the record in the run (edits)")
    add_ways_in(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Scale, remove or rewrite subcomponents of a run's target; tell the effect, and what else changes."""
    parser = _arguments()
    args = parser.parse_intermixed_args(argv)
    if args.save is not None and len(args.alpha) > 1:
        parser.error("--save writes one model; name one --alpha")
    if args.random < 0:
        parser.error(f"--random {args.random}: a number of edits is needed, or 0 for none")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", args.name) or args.name.startswith("."):
        parser.error(f"--name {args.name!r}: letters, digits, '.', '_' and '-' are allowed")
    with console_log(), user_errors():
        members = read_members(args.members, args.file)
        run = load_run(args.run_dir, trust=args.trust, verify=not args.unverified)
        token = None if args.rewrite is None else output_named(run, args.rewrite)
        wanted = token if args.wanted is None else output_named(run, args.wanted)
        if wanted is not None:
            _check_output(wanted, _n_outputs(run))
        wishes = [Wish(factor=0.0 if args.remove else args.scale)]
        if token is not None:
            wishes = [Wish(token=token, alpha=alpha) for alpha in args.alpha]
        options = {"wanted": wanted, "n_random": args.random}
        found = [edited(run, members, wish, **options) for wish in wishes]
        path = args.run_dir / ANALYSIS / f"{args.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record(run, found, wanted))
        saved = None if args.save is None else save(run, found[0].edit, args.save)
    of_tokens = run.problem.recon == "kl"
    print(*lines(found, of_tokens=of_tokens), sep="\n")
    moved = "logit (less the mean of all)" if of_tokens else "output"
    print(
        f"predicted, measured: mean change of the {moved} that is wanted, where an edited subcomponent is"
        " on; D: of the original and the edited model, there, on up to 20 tokens on either side where none"
        f" is (near), and wherever none is; in {path}"
    )
    if saved is not None:
        print(f"the edited model: {saved}")


if __name__ == "__main__":
    main()
