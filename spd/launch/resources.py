"""What a job is given: from options, from SPD_SLURM_… in the environment, from a YAML file."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import psutil
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from spd.config import (
    BaseConfig,
    UserError,
    nearest,
    parse,
    read_yaml,
)

PREFIX = "SPD_SLURM_"
SLURM_TIME = re.compile(r"(?:(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)-(\d+)(?::(\d\d))?)")
"""[D-]HH:MM:SS, or D-HH[:MM]"""


def _minutes(value: Any) -> Any:
    """Minutes, a part of one counting as a whole, of `90`, `1:30:00`, `2-00:00:00`, `2-00:00` or `2-00`.

    `1:30` is minutes and seconds to SLURM and hours and minutes to everybody else: `ValueError`.
    """
    text = value.strip() if isinstance(value, str) else ""
    if re.fullmatch(r"\d+:\d\d", text):
        raise ValueError(f"{text} can be read in two ways; write {text}:00, or minutes alone")
    found = SLURM_TIME.fullmatch(text)
    if found is None:
        return value
    parts = [int(part or 0) for part in found.groups()]
    days, hours, minutes, seconds = parts[:4] if found[2] else (*parts[4:], 0)
    return (24 * days + hours) * 60 + minutes + (seconds > 0)


def _of(letters: str, what: str) -> AfterValidator:
    """Marks an option of SLURM that becomes a line of the job script: of these letters alone."""

    def check(value: str) -> str:
        if not re.fullmatch(rf"(?!-)[A-Za-z0-9_{re.escape(letters)}]{{1,200}}", value):
            raise ValueError(
                f"{value!r} is no {what}: up to 200 letters, digits, '_' and {' '.join(letters)} are"
                " allowed, the first of them no '-'"
            )
        return value

    return AfterValidator(check)


Partitions = Annotated[str, _of(".,+-", "partition of SLURM")]
Account = Annotated[str, _of(".+@-", "account of SLURM")]
Qos = Annotated[str, _of(".,+-", "quality of service of SLURM")]
Constraint = Annotated[str, _of(".,:=&|*!()[]-", "constraint of SLURM")]


class Resources(BaseConfig):
    """Of one job. Names are those of the options; `SPD_SLURM_PARTITION` and so on mean the same."""

    partition: Partitions | None = Field(default=None, description="SLURM partition")
    account: Account | None = Field(default=None, description="SLURM account")
    qos: Qos | None = Field(default=None, description="SLURM quality of service")
    constraint: Constraint | None = Field(default=None, description="SLURM constraint, as 'a100'")
    gpus: int = Field(
        default=1, ge=0, description="per process; a job is one, if not told otherwise"
    )
    cpus: int = Field(default=1, ge=1, description="cores per process")
    nodes: int = Field(default=1, ge=1, description="machines per run, of spd-evals on SLURM")
    processes: int = Field(default=1, ge=1, description="per run and machine, joined by torchrun")
    memory_gb: float = Field(default=4.0, gt=0.0, description="per process")
    time: Annotated[int | None, BeforeValidator(_minutes)] = Field(
        default=None,
        ge=1,
        description="limit per job: minutes, [D-]HH:MM:SS or D-HH[:MM]; default from experience",
    )
    max_parallel: int | None = Field(default=None, ge=1, description="jobs at a time, at most")
    grace: int = Field(
        default=90, ge=1, description="seconds before a limit at which a checkpoint is written"
    )
    max_timeouts: int = Field(
        default=1000, ge=0, description="how often a job may go on after its time limit"
    )


class LaunchOptions(Resources):
    """What the commands that launch jobs have in common."""

    ensemble: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="all seeds in one process; auto: where jobs use a GPU, not for language models",
    )
    cpu: bool = Field(default=False, description="no GPU: run on the CPU even where one is visible")
    local: bool = Field(default=False, description="on this machine even where there is SLURM")
    retries: int = Field(
        default=1,
        ge=0,
        description="how often what failed goes on in its own run directory; not over several machines",
    )
    dry_run: bool = Field(default=False, description="print what would be run or submitted")
    slurm: Path | None = Field(default=None, description="YAML file with any of these options")

    @model_validator(mode="after")
    def _no_gpus_on_the_cpu(self) -> Self:
        if self.cpu and self.gpus > 0 and "gpus" in self.model_fields_set:
            raise ValueError(f"--cpu and gpus={self.gpus} contradict each other")
        return self

    @model_validator(mode="after")
    def _one_process_for_many_seeds(self) -> Self:
        if self.joined and self.ensemble == "always":
            raise ValueError(
                f"--ensemble always puts runs into one process, --nodes {self.nodes} and --processes"
                f" {self.processes} do the contrary"
            )
        return self

    @property
    def n_retries(self) -> int:
        """Of a job: torchrun on several machines would have to begin anew on all of them at once."""
        return self.retries if self.nodes == 1 else 0

    @property
    def joined(self) -> bool:
        """Whether several processes work on a run."""
        return self.nodes * self.processes > 1

    @property
    def n_gpus(self) -> int:
        """Of all processes of a job on one machine, as are the next two."""
        return 0 if self.cpu else self.gpus * self.processes

    @property
    def n_cpus(self) -> int:
        return self.cpus * self.processes

    @property
    def n_gb(self) -> float:
        return self.memory_gb * self.processes


def with_surroundings(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`options` above the environment above the YAML file that `slurm` names."""
    fields = Resources.model_fields
    merged: dict[str, Any] = {}
    if options.get("slurm"):
        path = Path(options["slurm"])
        raw = read_yaml(path)
        parse(Resources, raw, str(path))
        merged |= raw
    for variable, value in os.environ.items():
        if not variable.startswith(PREFIX) or not value:
            continue
        key = variable.removeprefix(PREFIX).lower()
        if key not in fields:
            known = [PREFIX + field.upper() for field in fields]
            raise UserError(
                f"{variable}: no such setting{nearest(variable, known)} (known: {', '.join(known)})"
            )
        parse(Resources, {key: value}, variable)
        merged[key] = value
    if str(options.get("cpu", "")).lower() in ("true", "yes", "on", "1"):
        merged.pop("gpus", None)
    return {**merged, **options}


def has_slurm() -> bool:
    """Whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def visible_gpus() -> list[str]:
    """The GPUs that jobs may use here, by the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    lines = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(lines))]


def uses_gpus(options: LaunchOptions) -> bool:
    """Whether the jobs will run on a GPU."""
    submitted = has_slurm() and not options.local
    return options.n_gpus > 0 and (submitted or bool(visible_gpus()))


def wants_ensemble(options: LaunchOptions) -> bool:
    """Whether runs that differ in their seed alone go side by side, where they can.

    A GPU has room for many small models at once; CPU cores work on as many jobs as there are cores.
    """
    if options.ensemble == "auto":
        return uses_gpus(options) and not options.joined
    return options.ensemble == "always"


def places(resources: LaunchOptions) -> list[dict[str, str]]:
    """As many jobs as this machine holds at a time: the environment that each of them gets."""
    free_gb = psutil.virtual_memory().available / 2**30
    counts = [
        n_usable_cores() // resources.n_cpus,
        int(free_gb / resources.n_gb),
        resources.max_parallel or 10**6,
    ]
    gpus = visible_gpus() if resources.n_gpus else []
    if not gpus:
        return [{} for _ in range(max(1, min(counts)))]
    each = resources.n_gpus
    n = max(1, min(*counts, len(gpus) // each))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(n)]


def n_usable_cores() -> int:
    """Those that this process may use, where the system can restrict it to some; else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1
