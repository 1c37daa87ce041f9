"""The runs that train.py compares, ours, stock LitGPT's and dense ones, and how they are timed."""

import contextlib
import functools
import io
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from litgpt import Tokenizer, pretrain
from litgpt.config import Config
from litgpt.data import DataModule
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from litgpt_moe.config import MoEConfig, model_facts
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.hardware import DTYPES, mallopt, pick_device, training_device, will_compile
from litgpt_moe.kernels.choice import choose_kernel
from litgpt_moe.kernels.matmul import prefers_onednn
from litgpt_moe.kernels.triton import has_triton
from litgpt_moe.training import loop
from litgpt_moe.training.loss_scaling import MixedLossScaling
from litgpt_moe.training.run import Run, to_litgpt
from litgpt_moe.training.settings import BalanceArgs, EvalArgs, Settings, TrainArgs
from litgpt_moe.training.steps import StopSignals
from run_train import train
from tools.benchmarks.train_settings import TrainBenchmark

Train = Callable[[Run], None]
PARTS = ("data", "forward", "loss", "backward", "optimizer", "logging")
LEFT_OUT = 2  # first steps of a run: allocations, compilation


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what is printed in here to itself."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer, which a run copies into its checkpoint, to folder/tokenizer."""
    with quiet():
        prepare(PrepareSettings(folder / "data", "demo", folder / "tokenizer", train_tokenizer=512))


class RandomTokens(DataModule):
    """Random tokens, whose loading costs next to nothing, for all alike."""

    train_data_path = "random/train"

    def __init__(self, vocab_size: int, block_size: int, micro_batch_size: int, n_batches: int) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size
        self.micro_batch_size, self.n_batches = micro_batch_size, n_batches

    def connect(self, *_: Any, **__: Any) -> None:
        """Take nothing over from the run."""

    def _loader(self, n: int) -> DataLoader[torch.Tensor]:
        generator, shape = torch.Generator().manual_seed(0), (n * self.micro_batch_size, self.block_size + 1)
        rows: Any = torch.randint(self.vocab_size, shape, generator=generator)
        return DataLoader(rows, batch_size=self.micro_batch_size)

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        """Return the batches to train on."""
        return self._loader(self.n_batches)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        """Return two batches."""
        return self._loader(2)


def make_run(benchmark: TrainBenchmark, config: MoEConfig, folder: Path) -> Run:
    """Return a run for `config`: no checkpoints but the last, no validation."""
    length = benchmark.max_seq_length or config.block_size
    n_steps, batch = LEFT_OUT + benchmark.steps, benchmark.micro_batch_size * benchmark.accumulation
    train_args = TrainArgs(
        global_batch_size=batch,
        micro_batch_size=benchmark.micro_batch_size,
        max_tokens=n_steps * batch * length,
        max_seq_length=length,
        max_norm=1.0,
        save_interval=None,
        log_interval=1,
        lr_warmup_steps=1,
    )
    settings = Settings(
        out_dir=folder / "out",
        tokenizer_dir=folder / "tokenizer",
        precision=benchmark.precision,
        compile=benchmark.compile,
        progress=False,
        train=train_args,
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
        moe=BalanceArgs(aux_loss_coef=0.01, z_loss_coef=0.001),
        devices=1,
    )
    precision, _ = training_device("auto", 1, 1, settings.precision)
    n_batches = n_steps * benchmark.accumulation
    data = RandomTokens(config.vocab_size, length, benchmark.micro_batch_size, n_batches)
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}
    return Run(settings, config, model_facts(config, length), data, optimizer, precision, 1)


def train_ours(run: Run) -> None:
    """Train as run_train.py does."""
    train(run, StopSignals())


def train_with_litgpts_layers(run: Run) -> None:
    """Train as run_train.py does, every linear map but the head multiplied as torch does it."""
    with mock.patch("litgpt_moe.training.model.use_fast_linear", lambda _: None):
        train_ours(run)


def train_by_triton(run: Run) -> None:
    """Train as run_train.py does on a GPU for which torch has no fast grouped GEMM."""
    with mock.patch("moe_layers.choose_kernel", lambda *_: "triton"):
        train_ours(run)


def train_stock(run: Run) -> None:
    """Train as `litgpt pretrain` does; `save_checkpoint` has no part in what is timed."""
    # the highest values that glibc's own dynamic thresholds reach; our runs in this process set others
    mallopt(mmap_max=65536, mmap_threshold=32 << 20, trim_threshold=64 << 20)
    settings = run.settings
    precision: Any = run.precision
    plugins: list[Any] = []
    if precision == "16-mixed":  # Fabric's own plugin refuses to clip for LitGPT's fused AdamW
        plugins, precision = [MixedLossScaling("cuda")], None
    train_args, eval_args = to_litgpt(settings)
    compiled, _ = will_compile(settings.compile, settings.accelerator)
    torch.compiler.set_stance("default" if compiled else "force_eager")
    keys = Config.__annotations__
    config = Config(**{key: value for key, value in vars(run.config).items() if key in keys})
    fabric = L.Fabric(devices=1, precision=precision, plugins=plugins, accelerator="auto")
    for plugin in plugins:
        plugin.start(fabric.device)
    if fabric.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as litgpt/__main__.py does
    with mock.patch.multiple(pretrain, measure_flops=lambda *_: 1.0, save_checkpoint=lambda *_: None):
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
            train=train_args,
            eval=eval_args,
            optimizer=run.optimizer,
        )


def contestants(run: Run, dense: MoEConfig) -> dict[str, tuple[Train, MoEConfig]]:
    """Return name -> what trains, and its model; `run` is ours, and `dense` the model of the same FLOPs."""
    config = run.config
    kinds: dict[str, tuple[Train, MoEConfig]] = {
        "ours": (train_ours, config),
        "dense": (train_with_litgpts_layers, dense),
        "stock": (train_stock, config),
        "stock dense": (train_stock, dense),
    }
    device, dtype = pick_device("auto", "auto")[0], DTYPES[run.precision.replace("mixed", "true")]
    if prefers_onednn(torch.empty(0, device=device, dtype=dtype)):
        kinds["dense oneDNN"] = (train_ours, dense)
    if has_triton(device.type, dtype) and choose_kernel(config, device, dtype) != "triton":
        kinds["ours, Triton"] = (train_by_triton, config)
    return kinds


def step_ends(train: Callable[[], None]) -> list[float]:
    """Return when each step of a run ends."""
    ends: list[float] = []

    def note_end(optimizer: Any, *_: Any) -> None:
        if type(optimizer).__name__ == "AdamW":
            ends.append(_now())

    hook = register_optimizer_step_post_hook(note_end)
    try:
        with quiet():
            train()
    finally:
        hook.remove()
    return ends


def step_times(train: Callable[[], None]) -> list[float]:
    """Return the seconds of each step but the first ones."""
    return [end - start for start, end in itertools.pairwise(step_ends(train)[LEFT_OUT - 1 :])]


@contextlib.contextmanager
def part_times() -> Iterator[list[tuple[str, float, float]]]:
    """Yield a list that gets (part, start, end) of each call; a nested call belongs to the outer one."""
    spans: list[tuple[str, float, float]] = []
    busy = False

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:
                return function(*args, **kwargs)
            busy, started = True, _now()
            try:
                return function(*args, **kwargs)
            finally:
                busy = False
                spans.append((part, started, _now()))

        return call

    ours = loop.TrainingFabric
    places = [
        ("data", pretrain.CycleIterator, "__next__"),
        ("forward", _FabricModule, "forward"),
        ("loss", pretrain, "chunked_cross_entropy"),
        ("loss", loop, "linear_cross_entropy"),
        ("optimizer", _FabricOptimizer, "step"),
        *(("backward", kind, "backward") for kind in (ours, L.Fabric)),
        *(("optimizer", kind, "clip_gradients") for kind in (ours, L.Fabric)),
        *(("logging", kind, "log_dict") for kind in (ours, L.Fabric)),
    ]
    with contextlib.ExitStack() as patches:
        for part, owner, name in places:
            patches.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield spans


def share_of_parts(train: Callable[[], None], n_steps: int) -> dict[str, float]:
    """Return part -> its share of the time of the timed steps."""
    with part_times() as spans:
        ends = step_ends(train)
    begin, end = ends[LEFT_OUT - 1], ends[LEFT_OUT + n_steps - 1]
    shares: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for part, started, ended in spans:  # a step ends inside its optimizer's call
        shares[part] += max(0.0, min(ended, end) - max(started, begin)) / (end - begin)
    return {part: round(share, 3) for part, share in shares.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
