"""Show which model fits which graphics card, and how long it trains there.

Run: uv run python tools/plan.py --gpu "RTX 3060" --hours 3 --data_dir data/mine     (a minute)

For each shipped configuration: its parameters, the peak memory of a training step by micro-batch size,
without and with activation checkpointing, the tokens that suit it, the time they take, and the learning rate.
The step is counted tensor by tensor, which needs no GPU. For one run on this machine: run_train.py --plan.
"""

from pathlib import Path

from litgpt_moe.cli import printable, run_command, run_script, say
from litgpt_moe.flags import FlagParser, config_from_flag

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("demo_model", "moe_10m", "moe_30m_debug", "moe_100m", "moe_200m", "moe_400m")
MODELS = [ROOT / f"configs/{name}.yaml" for name in NAMES]
CARDS = ["6 GB", "8 GB", "12 GB", "24 GB"]
PRECISIONS = ["bf16-true", "bf16-mixed", "16-mixed", "32-true"]


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 2 for a card, precision, optimizer, configuration or data that cannot be read."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("--gpu", action="append", help="name of a card, such as 'RTX 3060'; may be repeated")
    add("--memory", action="append", help="or its memory, such as 12GB (default: 6, 8, 12 and 24 GB)")
    add("--hours", type=float, help="tokens for so many hours, on --gpu or this machine (default: as suit)")
    add("--mfu", type=float, help="share of the peak FLOP/s, as a run's log has it (default: a typical one)")
    add("--data_dir", "--data", type=Path, help="prepared data: tokens for these, with their vocabulary")
    add("--model_config", action="append", type=config_from_flag, help="a model (default: ours); repeatable")
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the run (%(default)s)")
    add("--optimizer", default="torch.optim.AdamW", help="class, such as bitsandbytes.optim.AdamW8bit")
    args = parser.parse_args(argv)

    def run() -> None:
        from litgpt_moe.hardware import card_bytes
        from litgpt_moe.training import card_plan

        cards = [*(args.gpu or []), *(args.memory or [])] or CARDS
        for card in cards:
            card_bytes(card)  # an unknown one is an error before anything is counted
        for name, most in (("hours", 1e5), ("mfu", 1)):
            if (value := getattr(args, name)) is not None and not 0 < value <= most:
                raise ValueError(f"--{name} is {value:g}; choose a number above 0, up to {most:g}")
        text = card_plan.Text.of(args.data_dir) if args.data_dir else None
        speeds = [speed for gpu in args.gpu or [] if (speed := card_plan.speed_of(gpu, args.mfu))]
        if not speeds and (args.hours or args.mfu):
            speeds = [card_plan.speed_here(args.precision, args.mfu)]
        paths = args.model_config or MODELS
        plans = [card_plan.make_plan(path, args.precision, args.optimizer, text) for path in paths]
        length = card_plan.length_text(plans, speeds, args.hours, text)
        say(printable(f"{card_plan.memory_text(plans, cards)}\n\n{length}"))

    return run_command(run)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
