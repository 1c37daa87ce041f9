"""The end of a run of several processes: each leaves the group before Python ends."""

import gc
import sys


def leave_process_group() -> None:
    """Leave the group of processes, if this one is in any; its threads have ended then.

    Lightning 2.6 leaves NCCL's groups alone. A thread of gloo that outlives Python may ask for Python's lock,
    to free a tensor: Python ends such a thread, and C++ then aborts a process whose work was all done.
    """
    if "torch.distributed" not in sys.modules:
        return
    from torch import distributed  # not at the top: --help needs no torch

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    # What still holds the group (DDP's reducer, in a circle of references) goes first. The last to go is then
    # the group's Python object, which gives the lock away while it waits for the threads.
    gc.collect()
    distributed.destroy_process_group()
