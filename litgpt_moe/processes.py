"""The rank of this process, from the environment variables of a launcher."""

import contextlib
import os
import re
import sys

from litgpt_moe.cli import printable


def is_main_process() -> bool:
    """Return whether this process is rank 0, or the only one."""
    # torchrun and Slurm set the rank; Fabric's launcher sets node and device
    ranks = [os.environ[name] for name in ("RANK", "SLURM_PROCID") if name in os.environ][:1]
    return all(int(rank) == 0 for rank in ranks or map(os.environ.get, ("NODE_RANK", "LOCAL_RANK"), "00"))


def is_first_on_machine() -> bool:
    """Return whether this process is local rank 0, or the only one."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def note_once(text: str) -> None:
    """Print a line on stderr, on rank 0 only; a full disk there ends no work."""
    if is_main_process():
        with contextlib.suppress(OSError):
            print(printable(text), file=sys.stderr, flush=True)


def launcher_problems(world_size: int | None = None) -> list[str]:
    """Return a sentence for each launcher variable that is not a number or does not fit `world_size`."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if odd := {name: text for name, text in given.items() if not re.fullmatch(r"[0-9]{1,9}", text)}:
        way_out = "a launcher sets it to a number: unset it"
        return [f"${name} is {text!r}; {way_out}" for name, text in odd.items()]
    if world_size is None:
        return []
    there_are = f"but devices times num_nodes is {world_size}"
    if int(given.get("WORLD_SIZE", world_size)) != world_size:
        return [f"$WORLD_SIZE is {given['WORLD_SIZE']} {there_are}; make them equal, or unset WORLD_SIZE"]
    if "RANK" in given and int(given["RANK"]) >= world_size:
        return [f"$RANK is {given['RANK']} {there_are}; unset RANK, or raise devices or num_nodes"]
    return []
