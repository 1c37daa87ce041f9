"""Pretrain a Mixture-of-Experts model with LitGPT's own loop and tell a story with it.

Run: uv run python run_train.py     (3 minutes on two CPU cores: demo model, demo stories)

With CUDA it takes model_config.yaml and train_config.yaml, without it the demo settings in configs/.
Precedence: flag > environment variable > YAML > default. Any key is a flag: `--train.max_tokens 1000000`.
"""

# --help must answer at once: what it needs is imported here, and the rest, which takes seconds, in functions
import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe import cli, threads
from litgpt_moe.cli import run_script
from litgpt_moe.processes import is_main_process, launcher_problems
from litgpt_moe.training.settings import Settings, plain_settings

CONFIG_FLAGS = ("--config", "--train_config", "--model_config")

if TYPE_CHECKING:
    from litgpt_moe.training.hooks import LoopHooks
    from litgpt_moe.training.loop import TrainingFabric
    from litgpt_moe.training.run import Run
    from litgpt_moe.training.steps import StopSignals
    from litgpt_moe.training.summary import Result


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 2 after a message on bad settings, 1 after failed work, 130 after Ctrl-C."""
    started = time.monotonic()
    argv = cli.normalize_flags(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        parser = cli.FlagParser(prog="run_train.py", description=__doc__)
        cli.add_flags(parser, Settings)
        parser.print_help()
        return 0
    if sys.platform == "linux":
        # Before the first import of torch, which reads it once. MoE row counts differ from step to step, and
        # unless its segments can grow, the allocator keeps a block for each until memory is in pieces.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    threads.limit_spinning()
    try:
        run = set_up(argv, started)
    except KeyboardInterrupt:
        return cli.fail("stopped before training began; the same command goes on", cli.INTERRUPTED)
    except (ValueError, OSError) as error:
        return cli.fail(*cli.explain(error))
    return train_and_report(run, argv)


def set_up(argv: list[str], started: float) -> "Run":
    """Return the checked run, its data on disk. ValueError and OSError say what is wrong, and the way out."""
    # before Lightning, whose import trips over these variables
    if problems := launcher_problems():
        raise ValueError("\n".join(problems))
    refuse_missing_files(argv)
    from litgpt_moe.training import run as runs
    from litgpt_moe.training.batches import prepare_data_of

    cli.hear_ctrl_c()
    run = dataclasses.replace(runs.set_up(argv), started=started)
    # the other processes wait for it when the process group forms
    if is_main_process():
        prepare_data_of(run)
    return run


def refuse_missing_files(argv: list[str]) -> None:
    """Raise FileNotFoundError for a mistyped configuration file at once, before seconds of imports."""
    for flag, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = flag.partition("=")
        path = Path(value if equals else following)
        if name in CONFIG_FLAGS and not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such configuration file; name one that is there, as those in configs/ are"
            )


def train_and_report(run: "Run", argv: list[str]) -> int:
    """Train, print what came of it, and return the exit status."""
    from litgpt_moe.training.checks import run_lock
    from litgpt_moe.training.parse import resume_command
    from litgpt_moe.training.steps import StopSignals
    from litgpt_moe.training.summary import failure, report

    out_dir = run.settings.out_dir
    try:
        with run_lock(out_dir) if is_main_process() else contextlib.nullcontext():
            with StopSignals() as stops:
                result = train(run, stops)
            if is_main_process():
                print(report(run, result, resume_command(argv)), flush=True)
    except KeyboardInterrupt:
        return cli.fail(f"stopped; the model is in {out_dir / 'final'}", cli.INTERRUPTED)
    except BrokenPipeError:
        # whoever read the report has gone; the model is saved
        cli.silence_stdout()
    except (OSError, RuntimeError) as error:
        if (sentence := failure(error, out_dir)) is None:
            raise
        return cli.fail(sentence, 1)
    return 0


def train(run: "Run", stops: "StopSignals") -> "Result":
    """Train by LitGPT's own loop, and return what came of it; RunFailed says what a user has to mend."""
    from litgpt import pretrain

    from litgpt_moe.training.hooks import LoopHooks
    from litgpt_moe.training.loop import replaced_functions
    from litgpt_moe.training.run import to_litgpt
    from litgpt_moe.training.steps import Ending, RunFailed
    from litgpt_moe.training.summary import Result

    # LitGPT's own copies of the settings: the hooks change the first, to have it save before an early end
    train_args, eval_args = to_litgpt(run.settings)
    hooks = LoopHooks(run, stops, train_args)
    fabric, is_compiled = launch(run, hooks)
    try:
        with threads.watch_load(), replaced_functions(hooks, is_compiled), contextlib.suppress(Ending):
            pretrain.main(
                fabric=fabric,
                devices=run.devices,
                num_nodes=run.settings.num_nodes,
                seed=run.settings.seed,
                # training.hooks.prepare_model loads it: LitGPT would read bare weights alone
                initial_checkpoint_dir=None,
                resume=run.resume.file if run.resume else False,
                config=run.config,
                data=run.data,
                out_dir=run.settings.out_dir,
                tokenizer_dir=run.settings.tokenizer_dir,
                tokenizer=hooks.stories.tokenizer,
                train=train_args,
                eval=eval_args,
                optimizer=run.optimizer,
            )
    finally:
        hooks.close(fabric)
    if hooks.writer.failure is not None:
        raise RunFailed(f"{hooks.writer.failure}; then continue with --resume auto")
    return Result.of(hooks)


def launch(run: "Run", hooks: "LoopHooks") -> tuple["TrainingFabric", bool]:
    """Return the Fabric to train on, its processes running, and whether the model is compiled."""
    from litgpt_moe.training.loop import make_fabric, set_up_torch
    from litgpt_moe.training.summary import describe

    fabric = make_fabric(run, hooks, [hooks.metrics, *other_loggers(run, hooks)])
    is_compiled, why = set_up_torch(run.settings, fabric.device)
    fabric.launch()
    if fabric.is_global_zero:
        open_out_dir(run, hooks)
    for logger in fabric.loggers:
        logger.log_hyperparams(plain_settings(run.settings))
    fabric.print(describe(run, fabric.device, "compiled" if is_compiled else "eager", why))
    return fabric, is_compiled


def other_loggers(run: "Run", hooks: "LoopHooks") -> list[Any]:
    """Return the loggers beside metrics.csv: none, TensorBoard's or W&B's."""
    if run.settings.logger_name == "tensorboard":
        from litgpt.utils import choose_logger

        return [choose_logger("tensorboard", run.settings.out_dir, f"pretrain-{run.config.name}")]
    if run.settings.logger_name == "wandb":
        from litgpt_moe.training.wandb_log import WandbLog

        wandb = WandbLog(run, hooks.metrics.print)
        hooks.writer.on_saved = wandb.log_checkpoint
        return [wandb]
    return []


def open_out_dir(run: "Run", hooks: "LoopHooks") -> None:
    """Clear the run's folder of what is not part of this run's history, and write what the run is."""
    from litgpt_moe.checkpoints.writer import delete_run, tidy
    from litgpt_moe.training.summary import write_run_facts

    out_dir = run.settings.out_dir
    if run.settings.overwrite:
        delete_run(out_dir)
    tidy(out_dir, run.start_step)
    if run.resume is None:
        hooks.logs.keep({})
    write_run_facts(run)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
