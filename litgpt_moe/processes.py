"""The rank of this process, from the environment variables of a launcher."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from litgpt_moe.cli import note


class Launcher(NamedTuple):
    """The variables by which a launcher tells each process its place."""

    mark: str
    """The variable by which Lightning detects it."""
    size: str
    rank: str
    local_rank: str
    others: tuple[str, ...] = ()
    """What Lightning reads besides."""


TORCHRUN = Launcher("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK")
SLURM = Launcher("SLURM_NTASKS", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", ("SLURM_NODEID",))
JSRUN = Launcher(
    *("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK"),
    ("LSB_JOBID", "LSB_DJOB_RANKFILE"),
)
# the variables that Lightning reads as numbers by what they count, each with its launcher, None: any
IN_ALL = {"RANK": None, "SLURM_PROCID": SLURM, "JSM_NAMESPACE_RANK": JSRUN}
ON_MACHINE = {"LOCAL_RANK": None, "SLURM_LOCALID": SLURM, "JSM_NAMESPACE_LOCAL_RANK": JSRUN}
MACHINES = {"NODE_RANK": None, "GROUP_RANK": None, "SLURM_NODEID": SLURM}
SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "JSM_NAMESPACE_SIZE")
NUMBERS = (*IN_ALL, *ON_MACHINE, *MACHINES, *SIZES, "LSB_JOBID")
PORTS = ("MASTER_PORT", "STANDALONE_PORT")
# with these Lightning's command `fabric run` replaces what a script asks for
FABRIC_RUN = ("LT_CLI_USED", "LT_ACCELERATOR", "LT_STRATEGY", "LT_DEVICES", "LT_NUM_NODES", "LT_PRECISION")


def launcher() -> Launcher | None:
    """Return what started this process, as Lightning detects it; None: a user, or Lightning itself."""
    if TORCHRUN.mark in os.environ:
        return TORCHRUN
    # a shell in a Slurm job is no task of it
    if SLURM.mark in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return SLURM
    marks = {"LSB_JOBID", "LSB_DJOB_RANKFILE", JSRUN.local_rank, JSRUN.size}
    return JSRUN if marks <= os.environ.keys() else None


def is_main_process() -> bool:
    """Return whether this process is rank 0, or the only one."""
    if found := launcher():
        return os.environ.get(found.rank, "0") == "0"
    machine = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return machine == os.environ.get("LOCAL_RANK", "0") == "0"


def is_first_on_machine() -> bool:
    """Return whether this process is local rank 0, or the only one."""
    return os.environ.get((launcher() or TORCHRUN).local_rank, "0") == "0"


def note_once(text: str) -> None:
    """Print a line on stderr, on rank 0 only; a full disk there ends no work."""
    if is_main_process():
        note(text)


def launcher_problems(devices: int | None = None, num_nodes: int = 1) -> list[str]:
    """Return a sentence for each launcher variable that is no number, or does not fit the run's processes.

    A process that takes itself for another rank would train without a log, a report and a lock.
    """
    odd = [name for name in NUMBERS if not re.fullmatch("0|[1-9][0-9]{0,8}", os.environ.get(name, "0"))]
    problems = [f"${n} is {os.environ[n]!r}; a launcher sets it to a number: unset it" for n in odd]
    for name in FABRIC_RUN:
        if name in os.environ:
            text = "by which Lightning would replace this run's setting: unset it"
            problems.append(f"${name} is {os.environ[name]!r}, {text}")
    if problems or devices is None:
        return problems
    return list(dict.fromkeys([*_misfits(devices, num_nodes), *_gaps(devices * num_nodes)]))


def _misfits(devices: int, num_nodes: int) -> Iterator[str]:
    """Yield a sentence for each variable whose number is not one of a run of this size."""
    found, world_size = launcher(), devices * num_nodes
    on_machine, machines = f"the number of devices is {devices}", f"the number of machines is {num_nodes}"
    there_are = f"devices times num_nodes is {world_size}"
    sizes = {"WORLD_SIZE": (world_size, there_are)} | ({found.size: (world_size, there_are)} if found else {})
    if found is SLURM:
        sizes |= {"SLURM_NTASKS_PER_NODE": (devices, on_machine), "SLURM_NNODES": (num_nodes, machines)}
    for name, (size, what) in sizes.items():
        if int(os.environ.get(name, size)) != size:
            yield f"${name} is {os.environ[name]} but {what}; make them equal, or unset {name}"
    for names, size, what in (
        (IN_ALL, world_size, there_are),
        (ON_MACHINE, devices, on_machine),
        (MACHINES, num_nodes, machines),
    ):
        for name, owner in names.items():
            # torchrun's own ranks come before those of the cluster that it runs in
            counts = owner is None or found is not TORCHRUN
            if counts and int(os.environ.get(name, 0)) >= size:
                yield f"${name} is {os.environ[name]} but {what}; unset {name}, or raise devices or num_nodes"


def _gaps(world_size: int) -> Iterator[str]:
    """Yield a sentence for each variable that Lightning needs and does not have, or cannot use."""
    if found := launcher():
        for name in (found.size, found.rank, found.local_rank, *found.others):
            if name not in os.environ:
                yield f"${found.mark} is set but {name} is not, which its launcher sets: unset {found.mark}"
    if found is SLURM and os.environ["SLURM_NTASKS"] != "1" and "SLURM_NTASKS_PER_NODE" not in os.environ:
        yield "$SLURM_NTASKS is set without SLURM_NTASKS_PER_NODE: give Slurm --ntasks-per-node"
    if found is JSRUN and not Path(file := os.environ["LSB_DJOB_RANKFILE"]).is_file():
        yield f"$LSB_DJOB_RANKFILE is {file}, which is no file: start the run with jsrun"
    for name in PORTS if world_size > 1 else ():
        port = os.environ.get(name, "0")
        if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
            yield f"${name} is {port!r}; the number of a port is 0 to 65535: unset it"
