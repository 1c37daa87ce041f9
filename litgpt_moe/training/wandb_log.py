"""The run on W&B. What fails there is reported, and training goes on."""

import os
import queue
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.loggers.logger import Logger
from litgpt.utils import choose_logger
from wandb import errors

from litgpt_moe.cli import first_line
from litgpt_moe.data.artifact import CONNECT_SECONDS, lineage, log_checkpoint, use_dataset
from litgpt_moe.data.module import TextShards
from litgpt_moe.files import write_whole
from litgpt_moe.processes import is_main_process
from litgpt_moe.training.run import Run
from litgpt_moe.training.steps import RunFailed

# at the end, for data and checkpoints, then for the metrics; `wandb sync` sends what is left
PATIENCE_S = 150


class WandbLog(Logger):
    """Lightning's W&B logger behind a guard, and a thread for artifacts.

    Data and checkpoints have their own thread because W&B, without a network, tries each again for minutes.
    """

    # Lightning asks for both; one log holds all resumes of a run, so it has no version
    name = property(lambda self: "wandb")
    version = property(lambda self: None)

    def __init__(self, run: Run, tell: Callable[[str], None]) -> None:
        self.run, self.tell = run, tell
        self.logger: Any = connect(run, tell) if is_main_process() else None
        """Lightning's logger; None on other ranks, and once W&B is lost."""
        self.latest: dict[str, float] = {}
        self.lineage: dict[str, str | None] = {}
        self._uploads: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._uploader = threading.Thread(target=self._upload, name="wandb", daemon=True)
        self._uploader.start()
        if self.logger is not None and isinstance(run.data, TextShards):
            data_dir = Path(run.data.train_data_path).parent
            self.lineage = lineage(data_dir)
            self.logger.experiment.config.update({"dataset": self.lineage}, allow_val_change=True)
            self._send(use_dataset, data_dir, run.settings.tokenizer_dir)

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Record the settings."""
        self._guarded(lambda: self.logger.log_hyperparams(params))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Record a row of metrics."""
        self.latest |= {key: float(metrics[key]) for key in ("loss", "val_loss") if key in metrics}
        self._guarded(lambda: self.logger.log_metrics(metrics, step))

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Send a saved checkpoint as an artifact, if the settings want it."""
        args, is_final = self.run.settings.checkpoints, folder.name == "final"
        if args.to_wandb == "none" or not (is_final or (args.to_wandb == "kept" and args.keeps(step))):
            return
        reached = {"step": step, "tokens": step * self.run.tokens_per_step, **self.latest}
        self._send(log_checkpoint, folder, self.run.config.name, {**reached, "dataset": self.lineage})

    def finalize(self, status: str) -> None:
        """Wait, within bounds, until W&B has everything."""
        if self.logger is not None:
            self._uploads.put(None)
            self._uploader.join(PATIENCE_S)
            self._guarded(self.logger.experiment.finish)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            if self.logger is not None:
                call()
        except Exception as error:  # noqa: BLE001 - whatever W&B raises is not worth the training
            self.logger = None
            self.tell(
                f"Warning: W&B is lost ({first_line(error)}); training goes on, "
                f"{self.run.settings.out_dir}/logs has all"
            )

    def _send(self, function: Callable[..., None], subject: Path, *args: Any) -> None:
        def upload() -> None:
            try:
                if self.logger is not None:
                    function(self.logger.experiment, subject, *args)
            except Exception as error:  # noqa: BLE001 - as above
                reason = f"is not recorded on W&B: {first_line(error)}; training goes on"
                self.tell(f"Warning: {subject} {reason}")

        self._uploads.put(upload)

    def _upload(self) -> None:
        while (upload := self._uploads.get()) is not None:
            upload()


def connect(run: Run, tell: Callable[[str], None]) -> Any:
    """Return Lightning's logger with the run begun, offline without a network; RunFailed without a login."""
    try:
        return _connect(run)
    except (errors.UsageError, errors.AuthenticationError) as error:
        raise RunFailed(f"W&B: {first_line(error)}; WANDB_MODE=offline trains without a login") from error
    except errors.Error as error:
        logger = _connect(run, mode="offline")
        tell(f"Warning: no W&B ({first_line(error)}): recording offline, for wandb sync")
        return logger


def _connect(run: Run, **options: Any) -> Any:
    settings = run.settings
    options["settings"] = wandb.Settings(init_timeout=CONNECT_SECONDS, finish_timeout=PATIENCE_S)
    options["log_args"] = {key: value for key, value in asdict(settings.log).items() if value is not None}
    options |= {"id": run_id(run), "resume": "allow"}
    # Lightning's logger does not look at the variable
    options["save_dir"] = os.environ.get("WANDB_DIR") or "."
    logger = choose_logger("wandb", settings.out_dir, f"pretrain-{run.config.name}", **options)
    # the first access connects
    _ = logger.experiment
    return logger


def run_id(run: Run) -> str:
    """Return the id of this run on W&B, the same over all its resumes."""
    path = run.settings.out_dir / ".wandb_run_id"
    if run.resume and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    # eight characters, as W&B's own
    new_id = secrets.token_hex(4)
    if is_main_process():
        write_whole(path, new_id)
    return new_id
