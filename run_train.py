"""Pretrain a Mixture-of-Experts model with LitGPT's own loop and tell a story with it.

Run: uv run python run_train.py     (3 minutes on two CPU cores: demo model, demo stories)

With CUDA and text it takes model_config.yaml and train_config.yaml, else the demo settings in configs/.
Precedence: flag > environment variable > YAML > default. Any key is a flag: `--train.max_tokens 10M`.
"""

# --help must answer at once: the imports that take seconds stand in functions
import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe import cli, threads
from litgpt_moe.cli import run_script
from litgpt_moe.flags import ALL, normalize_flags
from litgpt_moe.processes import is_main_process, launcher_problems
from litgpt_moe.shell import with_home
from litgpt_moe.training.help import print_help
from litgpt_moe.training.leaving import leave_process_group
from litgpt_moe.training.output import lasting_output
from litgpt_moe.words import config_file

CONFIG_FLAGS = ("--config", "--train_config", "--model_config")

if TYPE_CHECKING:
    from litgpt_moe.training.hooks import LoopHooks
    from litgpt_moe.training.run import Run
    from litgpt_moe.training.steps import StopSignals


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 2 for bad settings, 1 for failed work, 130 after Ctrl-C."""
    started = time.monotonic()
    argv = normalize_flags(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", ALL} & set(argv):
        print_help(argv, __doc__)
        return 0
    cli.set_quiet("--quiet" in argv)
    argv = [word for word in argv if word != "--quiet"]
    if sys.platform == "linux":
        # Set before torch is imported, which reads it once. The experts' row counts differ in each step: with
        # segments that cannot grow, the allocator keeps a block for each size, and memory fragments.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    threads.limit_spinning()
    # held gets the lock of out_dir, until the end of the run
    with lasting_output(), contextlib.ExitStack() as held:
        held.callback(leave_process_group)
        try:
            run = set_up(argv, started, held)
        except KeyboardInterrupt:
            return cli.fail("stopped before training began; the same command goes on", cli.INTERRUPTED)
        except MemoryError:
            return cli.fail("out of memory before training began; close other programs, or use less text", 1)
        except (ValueError, OSError) as error:
            return cli.fail(*cli.explain(error))
        return plan(run) if run.settings.plan else train_and_report(run, argv)


def set_up(argv: list[str], started: float, held: contextlib.ExitStack) -> "Run":
    """Return the checked run, its data on disk; ValueError and OSError say what is wrong, and the way out."""
    # checked before the import of Lightning, which fails on these variables
    if problems := launcher_problems():
        raise ValueError("\n".join(problems))
    refuse_missing_files(argv)
    with cli.status("loading PyTorch and LitGPT", is_main_process()):
        from litgpt_moe.training import run as runs
        from litgpt_moe.training.batches import prepare_data_of

    cli.hear_ctrl_c()
    with cli.status("checking the settings", is_main_process()):
        run = dataclasses.replace(runs.set_up(argv, held), started=started)
    if run.settings.plan:
        # without prepared data, a length that they decide stays unknown
        with contextlib.suppress(FileNotFoundError):
            run = runs.settle(run)
        return run
    # the other processes wait for rank 0 when the process group forms
    if is_main_process():
        prepare_data_of(run)
    return runs.settle(run)


def refuse_missing_files(argv: list[str]) -> None:
    """Raise FileNotFoundError for a mistyped configuration file at once, before seconds of imports."""
    for flag, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = flag.partition("=")
        if name in CONFIG_FLAGS:
            config_file(Path(with_home(value if equals else following)))


def plan(run: "Run") -> int:
    """Print what the run would take, and return the exit status."""
    from litgpt_moe.training.forecast import plan_text

    return cli.run_command(lambda: plan_text(run))


def train_and_report(run: "Run", argv: list[str]) -> int:
    """Train, print the report, and return the exit status."""
    from litgpt_moe.training.second_try import second_try
    from litgpt_moe.training.steps import StopSignals
    from litgpt_moe.training.summary import failure, report

    final = run.settings.out_dir / "final"
    try:
        with StopSignals() as stops:
            hooks = train(run, stops)
            if hooks is None:
                run = second_try(run)
                hooks = train(run, stops)
            assert hooks is not None  # there is no third try
    except (OSError, RuntimeError, MemoryError) as error:
        if (sentence := failure(error, run, argv)) is None:
            raise
        return cli.fail(sentence, 1)
    try:
        if is_main_process():
            with cli.status("telling a story"):
                text = report(hooks, argv)
            cli.say_result(text)
    except KeyboardInterrupt:
        return cli.fail(f"stopped; the model is in {final}", cli.INTERRUPTED)
    except (OSError, RuntimeError, MemoryError) as error:
        if failure(error, run, argv) is None:
            raise
        return cli.fail(f"the model is in {final}, but its report failed: {cli.first_line(error)}", 1)
    return 0


def train(run: "Run", stops: "StopSignals") -> "LoopHooks | None":
    """Train with LitGPT's own loop and return the hooks; RunFailed says what the user has to fix.

    None means that the GPU's memory ran out before the first step, and that a second try may fit.
    """
    from litgpt import pretrain
    from torch import OutOfMemoryError

    from litgpt_moe.training.hooks import LoopHooks
    from litgpt_moe.training.loop import launch, replaced_functions
    from litgpt_moe.training.run import to_litgpt
    from litgpt_moe.training.second_try import may_try_again
    from litgpt_moe.training.steps import Ending, RunFailed

    # LitGPT's own copies of the settings; the hooks change them, to make it save before an early end
    train_args, eval_args = to_litgpt(run.settings)
    hooks = LoopHooks(run, stops, train_args, eval_args)
    fabric, is_compiled = launch(run, hooks)
    try:
        with threads.sleep_when_busy(), replaced_functions(hooks, is_compiled), contextlib.suppress(Ending):
            pretrain.main(
                fabric=fabric,
                devices=run.devices,
                num_nodes=run.settings.num_nodes,
                seed=run.settings.seed,
                # training.model.prepare_model loads it: LitGPT reads bare weights alone
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
    except OutOfMemoryError:
        if not may_try_again(run, hooks.step):
            raise
        hooks.is_discarded = True
        return None
    finally:
        hooks.close(fabric)
    if hooks.writer.failure is not None:
        raise RunFailed(f"{hooks.writer.failure}; then continue with --resume auto")
    return hooks


if __name__ == "__main__":
    raise SystemExit(run_script(main))
