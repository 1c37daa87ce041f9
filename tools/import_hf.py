"""Convert a model of Hugging Face Transformers to a checkpoint that LitGPT and our scripts can train.

Run: uv run python tools/import_hf.py TinyLlama/TinyLlama-1.1B-Chat-v1.0 checkpoints/tinyllama
(20 s for a small one, most of it imports; the name of a folder instead needs no network)

Mixtral, Qwen3-MoE, Llama and Qwen3 in safetensors files are converted if LitGPT computes exactly the same;
other classes and variants are refused. A repository is downloaded from the hub (HF_ENDPOINT chooses a
mirror); the same command resumes an interrupted download. No code of the repository is run.
"""

import argparse
from pathlib import Path

from litgpt_moe.cli import command_line, run_command, run_script
from litgpt_moe.flags import FlagParser


def import_checkpoint(args: argparse.Namespace) -> str:
    """Import the model; return the lines to print."""
    from litgpt_moe.checkpoints.layout import check_new_place, check_utf8
    from litgpt_moe.interop.import_folder import import_model
    from litgpt_moe.interop.upcycle import NEXT, training_command

    check_new_place(args.out)
    check_utf8(Path(args.source))
    line, has_experts = import_model(args.source, args.out)
    model = command_line("--ckpt_dir", args.out)
    upcycle = command_line(args.out, f"{args.out}_moe", "--n_expert", 8, "--n_expert_per_token", 2)
    lines = [line, NEXT, f'  uv run python generate.py {model} --prompt "Once upon a time"']
    if not has_experts:
        lines.append(f"  uv run python tools/upcycle.py {upcycle}")
    return "\n".join([*lines, f"  {training_command(args.out)}"])


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("source", help="a folder that Transformers saved, or OWNER/NAME on the hub")
    parser.add_argument("out", type=Path, help="checkpoint directory to make; must not exist, or be empty")
    args = parser.parse_args(argv)
    return run_command(lambda: import_checkpoint(args))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
