"""The run on W&B. A failure there is reported, and training goes on."""

import os
import queue
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wandb
from litgpt.utils import choose_logger
from wandb import errors

from litgpt_moe.cli import first_line
from litgpt_moe.data.artifact import CONNECT_SECONDS, lineage, log_checkpoint, use_dataset
from litgpt_moe.files import write_whole
from litgpt_moe.processes import is_main_process
from litgpt_moe.training.run import Run
from litgpt_moe.training.steps import RunFailed

# longest wait at the end: for the artifacts, then for the metrics; `wandb sync` sends what is left
PATIENCE_S = 150


class WandbLog:
    """Fabric's logger for W&B: Lightning's, whose errors are caught, and a thread that sends artifacts.

    The artifacts have their own thread because W&B retries each for minutes when there is no network.
    """

    def __init__(self, run: Run, warn: Callable[[str], None]) -> None:
        self.run, self.warn = run, warn
        self.logger: Any = connect(run, warn) if is_main_process() else None
        """Lightning's logger; None on other ranks, and after W&B's first error."""
        self.latest: dict[str, float] = {}
        self.lineage: dict[str, str | None] = {}
        self._uploads: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._uploader = threading.Thread(target=self._upload, name="wandb", daemon=True)
        self._uploader.start()
        if self.logger is not None and run.data_dir is not None:
            self.lineage = lineage(run.data_dir)
            self.logger.experiment.config.update({"dataset": self.lineage}, allow_val_change=True)
            self._uploads.put((use_dataset, run.data_dir, run.settings.tokenizer_dir))

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Record the settings."""
        self._guarded(lambda: self.logger.log_hyperparams(params))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Record a row of metrics."""
        self.latest |= {key: float(metrics[key]) for key in ("loss", "val_loss") if key in metrics}
        self._guarded(lambda: self.logger.log_metrics(metrics, step))

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Send a saved checkpoint as an artifact, if `checkpoints.to_wandb` asks for it."""
        args, is_final = self.run.settings.checkpoints, folder.name == "final"
        if args.to_wandb == "none" or not (is_final or (args.to_wandb == "kept" and args.keeps(step))):
            return
        reached: dict[str, Any] = {"step": step, "tokens": self.run.tokens_at(step), **self.latest}
        reached["dataset"] = self.lineage
        self._uploads.put((log_checkpoint, folder, self.run.config.name, reached))

    def finalize(self, status: str) -> None:
        """Wait for the artifacts and for the metrics, PATIENCE_S for each at most."""
        if self.logger is not None:
            self._uploads.put(None)
            self._uploader.join(PATIENCE_S)
            self._guarded(self.logger.experiment.finish)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            if self.logger is not None:
                call()
        except Exception as error:  # noqa: BLE001 - no error of W&B may end the training
            self.logger = None
            self.warn(
                f"Warning: W&B is lost ({first_line(error)}); training goes on, "
                f"{self.run.settings.out_dir}/logs has all"
            )

    def _upload(self) -> None:
        while (job := self._uploads.get()) is not None:
            function, subject, *args = job
            try:
                if self.logger is not None:
                    function(self.logger.experiment, subject, *args)
            except Exception as error:  # noqa: BLE001 - as above
                reason = f"is not recorded on W&B: {first_line(error)}; training goes on"
                self.warn(f"Warning: {subject} {reason}")


def connect(run: Run, warn: Callable[[str], None]) -> Any:
    """Return Lightning's logger, connected; offline without a network. RunFailed without a login."""
    try:
        return _connect(run)
    except (errors.UsageError, errors.AuthenticationError) as error:
        raise RunFailed(f"W&B: {first_line(error)}; WANDB_MODE=offline trains without a login") from error
    except errors.Error as error:
        logger = _connect(run, mode="offline")
        warn(f"Warning: no W&B ({first_line(error)}): recording offline, for wandb sync")
        return logger


def _connect(run: Run, **options: Any) -> Any:
    options["settings"] = wandb.Settings(init_timeout=CONNECT_SECONDS, finish_timeout=PATIENCE_S)
    options["log_args"] = {key: value for key, value in asdict(run.settings.log).items() if value is not None}
    # Lightning's logger ignores the variable
    options |= {"id": run_id(run), "resume": "allow", "save_dir": os.environ.get("WANDB_DIR") or "."}
    logger = choose_logger("wandb", run.settings.out_dir, f"pretrain-{run.config.name}", **options)
    # the first access connects
    _ = logger.experiment
    return logger


def run_id(run: Run) -> str:
    """Return the W&B id of this run, the same over all its resumes and tries."""
    path = run.settings.out_dir / ".wandb_run_id"
    if (run.resume or run.is_second_try) and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    # eight characters, as in W&B's own ids
    new_id = secrets.token_hex(4)
    write_whole(path, new_id)
    return new_id
