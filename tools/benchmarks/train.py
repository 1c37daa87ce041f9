"""Compare whole training steps: ours, stock LitGPT's loop and layer, and the dense model of the same FLOPs.

Run: uv run python tools/benchmark_train.py      (3 min on 2 CPU cores for MoE-30M)

All train in turn in one process on the same random tokens; a round is a fresh run of each, of which the
first steps are left out. Stock is `litgpt.pretrain.main` with LitGPT's own `LLaMAMoE` and one patch: its
count of FLOPs, which raises on MoE layers (0.5.13), is skipped. Dense has one SwiGLU as wide as the experts
that a token meets, LitGPT's layers, and our loop, loss and optimizer; "stock dense" trains in LitGPT's loop.
In LitGPT's loop glibc is told to give memory back as it does by itself; ours tells it not to, on a CPU.
Where our linear maps are multiplied by oneDNN (CPUs of AMD), "dense oneDNN" has those too. Printed are
medians, ratios of tokens/s and where the time of a step goes (from one more round, for there the clock waits
for the device); the JSON has the machine and versions too.
"""

import argparse
import contextlib
import functools
import io
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

import run_train
from litgpt_moe.cli import FlagParser
from tools.machine import count, machine

ROOT = Path(__file__).resolve().parents[1]

PARTS = ("data", "forward", "loss", "backward", "optimizer", "logging")
DENSE = ("dense", "dense oneDNN", "stock dense")
LEFT_OUT = 2  # first steps of a run: allocations, compilation


class Overrides(argparse.Action):
    """Keys of the model configuration, as n_expert=8, with values as in YAML."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        for text in values:
            try:
                key, value = text.split("=", 1)
                namespace.override = {**namespace.override, key: yaml.safe_load(value)}
            except (ValueError, yaml.YAMLError):
                parser.error(f"{flag}: {text} is no KEY=VALUE; write it as n_expert=8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = FlagParser(prog="tools/benchmark_train.py", description=__doc__)
    parser.add_argument("--model_config", type=Path, default=ROOT / "configs/moe_30m_debug.yaml")
    parser.add_argument("--override", nargs="+", default={}, action=Overrides, metavar="KEY=VALUE")
    parser.add_argument("--micro_batch_size", type=count, default=4)
    parser.add_argument("--accumulation", type=count, default=1, help="micro-batches of a step")
    parser.add_argument("--max_seq_length", type=count, help="tokens of a sequence (default: block_size)")
    parser.add_argument("--steps", type=count, default=5, help="timed steps of a round")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--precision", choices=("32-true", "bf16-true", "bf16-mixed"), default=None)
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    return parser.parse_args(argv)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what is printed in here to itself."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def random_data(vocab_size: int, block_size: int, micro_batch_size: int, n_batches: int) -> Any:
    """Return a LitGPT data module of random tokens; loading costs next to nothing, for all alike."""
    import torch
    from litgpt.data import DataModule
    from torch.utils.data import DataLoader

    class RandomTokens(DataModule):
        train_data_path = "random/train"

        def connect(self, *_: Any, **__: Any) -> None:
            pass

        def _loader(self, n: int) -> DataLoader:
            generator = torch.Generator().manual_seed(0)
            rows = torch.randint(vocab_size, (n * micro_batch_size, block_size + 1), generator=generator)
            return DataLoader(rows, batch_size=micro_batch_size)

        def train_dataloader(self) -> DataLoader:
            return self._loader(n_batches)

        def val_dataloader(self) -> DataLoader:
            return self._loader(2)

    return RandomTokens()


def make_run(args: argparse.Namespace, config: Any, folder: Path) -> run_train.Run:
    """Return a checked run of `run_train` for `config`: no checkpoints but the last, no validation."""
    from litgpt.args import EvalArgs, TrainArgs

    length = args.max_seq_length or config.block_size
    n_steps, batch = LEFT_OUT + args.steps, args.micro_batch_size * args.accumulation
    train = TrainArgs(
        global_batch_size=batch,
        micro_batch_size=args.micro_batch_size,
        max_tokens=n_steps * batch * length,
        max_seq_length=length,
        max_norm=1.0,
        save_interval=None,
        log_interval=1,
        lr_warmup_steps=1,
    )
    settings = run_train.Settings(
        out_dir=folder / "out",
        tokenizer_dir=folder / "tokenizer",
        precision=args.precision,
        compile=args.compile,
        progress=False,
        train=train,
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
        moe=run_train.BalanceArgs(aux_loss_coef=0.01, z_loss_coef=0.001),
        devices=1,
    )
    precision, _ = run_train.choose_device(settings)
    data = random_data(config.vocab_size, length, args.micro_batch_size, n_steps * args.accumulation)
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}
    return run_train.Run(settings, config, data, optimizer, precision, 1)


def train_ours(run: run_train.Run) -> None:
    """Train as run_train.py does."""
    run_train.train(run, run_train.StopSignals())


def train_with_litgpts_layers(run: run_train.Run) -> None:
    """Train as run_train.py does, every linear map but the head multiplied as torch does it."""
    with mock.patch("moe_layers.use_fast_linear", lambda _: None):
        train_ours(run)


def train_by_triton(run: run_train.Run) -> None:
    """Train as run_train.py does on a GPU for which torch has no fast grouped GEMM."""
    with mock.patch("moe_layers.choose_way", lambda *_: "triton"):
        train_ours(run)


def train_stock(run: run_train.Run) -> None:
    """Train as `litgpt pretrain` does; `save_checkpoint` has no part in what is timed."""
    import lightning as L
    import torch
    from litgpt import Tokenizer, pretrain
    from litgpt.config import Config

    from moe_layers import mallopt

    # what malloc comes to by itself when blocks of its largest threshold have been freed
    mallopt(mmap_max=65536, mmap_threshold=32 << 20, trim_threshold=64 << 20)
    settings, names = run.settings, ("measure_flops", "save_checkpoint")
    compiled, _ = run_train.will_compile(settings)
    torch.compiler.set_stance("default" if compiled else "force_eager")
    config = Config(
        **{key: value for key, value in vars(run.config).items() if key in Config.__annotations__}
    )
    originals = [getattr(pretrain, name) for name in names]
    try:
        pretrain.measure_flops, pretrain.save_checkpoint = lambda *_: 1.0, lambda *_: None
        fabric = L.Fabric(devices=1, precision=run.precision, accelerator="auto")
        if fabric.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as litgpt/__main__.py does
        pretrain.main(
            fabric=fabric,
            devices=1,
            seed=settings.seed,
            initial_checkpoint_dir=None,
            resume=False,
            config=config,
            data=run.data,
            out_dir=settings.out_dir,
            tokenizer_dir=settings.tokenizer_dir,
            tokenizer=Tokenizer(settings.tokenizer_dir),
            train=settings.train,
            eval=settings.eval,
            optimizer=run.optimizer,
        )
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(pretrain, name, original)


def step_times(train: Callable[[], None], at_step: Callable[[int], None] = lambda _: None) -> list[float]:
    """Return the seconds of each step but the first ones; `at_step` hears of the end of each step."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[float] = []

    def note_end(optimizer: Any, *_: Any) -> None:
        if type(optimizer).__name__ == "AdamW":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            at_step(len(ends))

    hook = register_optimizer_step_post_hook(note_end)
    try:
        with quiet():
            train()
    finally:
        hook.remove()
    return [end - start for start, end in zip(ends[LEFT_OUT - 1 :], ends[LEFT_OUT:], strict=False)]


@contextlib.contextmanager
def part_times() -> Iterator[list[tuple[str, float, float]]]:
    """Yield (part, start, end) of each of its calls in here; a call within another counts as the outer."""
    import lightning as L
    import torch
    from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
    from litgpt import pretrain

    import moe_layers

    spans: list[tuple[str, float, float]] = []
    busy = False

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:
                return function(*args, **kwargs)
            busy, started = True, _now(torch)
            try:
                return function(*args, **kwargs)
            finally:
                busy = False
                spans.append((part, started, _now(torch)))

        return call

    ours = run_train.training_fabric()
    places = [
        ("data", pretrain.CycleIterator, "__next__"),
        ("forward", _FabricModule, "forward"),
        ("loss", pretrain, "chunked_cross_entropy"),
        ("loss", moe_layers, "linear_cross_entropy"),
        ("optimizer", _FabricOptimizer, "step"),
        *(("backward", kind, "backward") for kind in (ours, L.Fabric)),
        *(("optimizer", kind, "clip_gradients") for kind in (ours, L.Fabric)),
        *(("logging", kind, "log_dict") for kind in (ours, L.Fabric)),
    ]
    originals = [getattr(owner, name) for _, owner, name in places]
    try:
        for (part, owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, timed(part, original))
        yield spans
    finally:
        for (_, owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def share_of_parts(train: Callable[[], None], n_steps: int) -> dict[str, float]:
    """Return part -> its share of the time of the timed steps."""
    ends: list[float] = []
    with part_times() as spans:
        step_times(train, lambda _: ends.append(time.perf_counter()))
    begin, end = ends[LEFT_OUT - 1], ends[LEFT_OUT + n_steps - 1]
    shares = dict.fromkeys(PARTS, 0.0)
    for part, started, ended in spans:  # a step ends inside its optimizer's call
        shares[part] += max(0.0, min(ended, end) - max(started, begin)) / (end - begin)
    return {part: round(share, 3) for part, share in shares.items()}


def _now(torch: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def triton_is_another_way(args: argparse.Namespace, config: Any, folder: Path) -> bool:
    """Return whether experts could be run by Triton here, and are not."""
    from moe_layers import choose_way, has_triton

    device, dtype = device_and_dtype(args, config, folder)
    return has_triton(device.type, dtype) and choose_way(config, device, dtype) != "triton"


def uses_onednn(args: argparse.Namespace, config: Any, folder: Path) -> bool:
    """Return whether our linear maps are multiplied in another way than torch's."""
    import torch

    from moe_layers import prefers_onednn

    device, dtype = device_and_dtype(args, config, folder)
    return prefers_onednn(torch.empty(0, device=device, dtype=dtype))


def device_and_dtype(args: argparse.Namespace, config: Any, folder: Path) -> tuple[Any, Any]:
    """Return what the runs compute on and in."""
    import torch

    is_bf16 = make_run(args, config, folder).precision.startswith("bf16")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.bfloat16 if is_bf16 else torch.float32


def contestants(
    args: argparse.Namespace, config: Any, folder: Path
) -> dict[str, tuple[Callable[[run_train.Run], None], Any]]:
    """Return name -> what trains and its model; on CUDA also ours with the experts in Triton."""
    from moe_layers import MoEConfig

    width = config.n_expert_per_token * config.moe_intermediate_size
    no_experts = {"intermediate_size": width, "n_expert": 0, "n_expert_per_token": 0}
    dense = MoEConfig.from_file(
        args.model_config, **{**args.override, "mlp_class_name": "LLaMAMLP", **no_experts}
    )
    kinds = {
        "ours": (train_ours, config),
        "stock": (train_stock, config),
        "dense": (train_with_litgpts_layers, dense),
        "stock dense": (train_stock, dense),
    }
    if uses_onednn(args, config, folder):
        kinds["dense oneDNN"] = (train_ours, dense)
    if triton_is_another_way(args, config, folder):
        kinds["ours, Triton"] = (train_by_triton, config)
    return kinds


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of all."""
    import torch

    from moe_layers import MoEConfig

    config = MoEConfig.from_file(args.model_config, **args.override)
    kinds = contestants(args, config, folder)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    memory: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, (train, its_config) in kinds.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            run = make_run(args, its_config, folder)
            times[name] += step_times(functools.partial(train, run))
            memory[name] = round(run_train.peak_memory_gb(), 3)
    shares = {
        name: share_of_parts(functools.partial(train, make_run(args, its_config, folder)), args.steps)
        for name, (train, its_config) in kinds.items()
    }
    run = make_run(args, config, folder)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rivals = [name for name in ("stock", *DENSE) if name in medians]
    return {
        "machine": machine(),
        "precision": run.precision,
        "compiled": run_train.will_compile(run.settings)[0],
        "model": config.name,
        "override": args.override,
        "tokens_per_step": run.tokens_per_step,
        "tokens_per_s": {name: round(run.tokens_per_step / value, 1) for name, value in medians.items()},
        **{ratio_key(name): float(f"{medians[name] / medians['ours']:.4g}") for name in rivals},
        "mfu": round(_mfu(run, medians["ours"]), 4),
        "share_of_step": shares,
        # one process: on a CPU this is the highest of all so far
        "peak_memory_gb": memory if torch.cuda.is_available() else {},
    }


def _mfu(run: run_train.Run, seconds: float) -> float:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = run_train.model_flops_per_token(run.config, run.block_size) * run.tokens_per_step
    return flops / seconds / run_train.peak_flops(device, run.precision)


def ratio_key(name: str) -> str:
    """Return the key of our speed as a share of that of `name`."""
    return "of_" + name.replace(" ", "_").lower()


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    device = figures["machine"]["device"]
    print(f"{figures['model']}, {figures['tokens_per_step']:,} tokens a step, {device}")
    print(f"{'':14}{'tokens/s':>10}" + "".join(f"{part:>11}" for part in PARTS))
    for name, rate in figures["tokens_per_s"].items():
        parts = "".join(f"{figures['share_of_step'][name][part]:>11.1%}" for part in PARTS)
        print(f"{name:14}{rate:>10,.0f}{parts}")
    ratios = [f"{figures[key]:.2f} of {name}" for name in DENSE if (key := ratio_key(name)) in figures]
    print(f"ours: {figures['of_stock']:.2f} times stock, {', '.join(ratios)}, MFU {figures['mfu']:.1%}")


def main(argv: list[str] | None = None) -> int:
    """Return 0; 2 after a message on a bad setting."""
    args = parse(argv)
    import prepare_data

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # "Seed set to 42", each time

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with quiet():
                # for the tokenizer alone, which a run copies into its checkpoint
                prepare_data.prepare(
                    prepare_data.PrepareSettings(
                        data_dir=folder / "data",
                        dataset="demo",
                        tokenizer_dir=folder / "tokenizer",
                        train_tokenizer=512,
                    )
                )
            figures = compare(args, folder)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    show(figures)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"Written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
