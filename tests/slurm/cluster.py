"""A real SLURM on loopback, all of it in one folder: for tests, and to try things out.

    python tests/slurm/cluster.py /tmp/cluster   # starts it, waits for Ctrl-C or SIGTERM, and ends it

It pretends to have two GPUs and as many cores as it is told, and, in the partition `pair`, a second
machine. Needs root and the Debian packages
slurm-wlm and munge. Nothing outside the folder is touched: SLURM_CONF leads every command to it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
N_CPUS, N_GPUS, MEMORY_MB = 4, 2, 22_000
STOP = (signal.SIGINT, signal.SIGTERM)
CONFIG = """
ClusterName=spd
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=20
MinJobAge=600
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} State=UNKNOWN
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} Gres=gpu:{gpus}
NodeName={second} NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port}
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=pair Nodes={host},{second} MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"needs SLURM (apt-get install slurm-wlm munge): no {', '.join(missing)}"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root: SLURM starts its daemons, and its GPUs are made with mknod"
    return None


@contextmanager
def running_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons; the environment in which SLURM's commands find them is handed over."""
    folder = folder.absolute()
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)
    _write_config(folder)
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_daemon(folder, environment, "munged", *_munge(folder)))
        _wait_for(lambda: (folder / "munge.socket").exists(), "munged", folder)
        daemons.append(_daemon(folder, environment, "slurmctld", "-D"))
        for node in (_host(), _second()):
            (folder / f"spool-{node}").mkdir()
            daemons.append(_daemon(folder, environment, "slurmd", "-D", "-N", node))
        _wait_for(lambda: _is_idle(environment), "the nodes", folder)
        yield environment
    finally:
        _call(environment, "scancel", "--me")
        _call(environment, "scancel", "--me", "--signal=KILL")
        for process in reversed(daemons):
            process.send_signal(signal.SIGTERM)
        for process in daemons:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _write_config(folder: Path) -> None:
    port, node_port, second_port = _free_ports(3)
    text = CONFIG.format(
        **{"host": _host(), "second": _second(), "folder": folder},
        **{"port": port, "node_port": node_port, "second_port": second_port},
        **{"cpus": N_CPUS, "memory": MEMORY_MB, "gpus": N_GPUS},
    )
    (folder / "slurm.conf").write_text(text)
    for index in range(N_GPUS):
        os.mknod(folder / f"gpu{index}", 0o666 | 0o020000, os.makedev(1, 3))
    gpus = f"NodeName={_host()} Name=gpu File={folder}/gpu[0-{N_GPUS - 1}]\n"
    (folder / "gres.conf").write_text(gpus)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _second() -> str:
    """Another name for this machine; the first of both, by which they meet, has to be a real one."""
    return f"{_host()}-second"


def _munge(folder: Path) -> tuple[str, ...]:
    return (
        *("--foreground", "--force", f"--socket={folder}/munge.socket"),
        *(f"--key-file={folder}/munge.key", f"--log-file={folder}/munged.log"),
        *(f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"),
    )


def _daemon(
    folder: Path, environment: dict[str, str], program: str, *args: str
) -> subprocess.Popen[bytes]:
    with (folder / f"{program}.out").open("ab") as log:
        return subprocess.Popen(
            [program, *args],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _is_idle(environment: dict[str, str]) -> bool:
    return _call(environment, "sinfo", "--noheader", "--format=%T").strip() == "idle"


def _call(environment: dict[str, str], *command: str) -> str:
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def _wait_for(condition, what: str, folder: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come up; see the logs in {folder}")
        time.sleep(0.2)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _path() -> str:
    """Debian keeps the daemons where an ordinary PATH does not lead."""
    return f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin"


if __name__ == "__main__":
    if reason := why_not():
        raise SystemExit(reason)
    with running_cluster(Path(sys.argv[1])) as found:
        print(f"up; in another shell: export SLURM_CONF={found['SLURM_CONF']}", flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
        signal.sigwait(STOP)
