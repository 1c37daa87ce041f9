"""What --overwrite deletes of an earlier run: what the run wrote, and nothing else."""

import contextlib
import re
from pathlib import Path

from litgpt_moe.checkpoints.layout import FINAL, LOGS
from litgpt_moe.checkpoints.writer import run_folders
from litgpt_moe.folders import delete_whole

LOG_FILES = ("run.json", "spikes.csv", "expert_load.csv", "stories.csv", "csv/metrics.csv")
# of Lightning's loggers, which number their folders
VERSION = re.compile("version_[0-9]+")
VERSION_FILES = ("metrics.csv", "hparams.yaml", "events.out.tfevents.*")


def delete_run(out_dir: Path) -> None:
    """Remove the checkpoints and logs of an earlier run from `out_dir`, and nothing else."""
    for folder in run_folders(out_dir):
        delete_whole(folder, out_dir / FINAL)
    logs = out_dir / LOGS
    parents = [logs / "csv", logs / "tensorboard"]
    versions = [path for parent in parents for path in parent.glob("version_*") if _is_version(path)]
    files = [path for folder in versions for name in VERSION_FILES for path in folder.glob(name)]
    for path in (*files, *(logs / name for name in LOG_FILES)):
        with contextlib.suppress(OSError):
            path.unlink()  # a folder of that name is somebody else's
    for folder in (*versions, *parents, logs):
        with contextlib.suppress(OSError):
            folder.rmdir()  # fails unless it is empty


def _is_version(path: Path) -> bool:
    return VERSION.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()
