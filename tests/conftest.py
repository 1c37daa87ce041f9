"""Fixtures shared by the tests: a tiny tokenizer, config and checkpoint, made here in seconds, no network."""

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

# what the helpers assert is told in full too
pytest.register_assert_rewrite("helpers")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one worker a core: more threads would wait for each other

ROOT = Path(__file__).parents[1]
# real stories, and a tokenizer trained on them: tests/assets/README.md names their source
ASSETS = ROOT / "tests" / "assets"
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process started here compiles every package again

SENTENCES = [
    f"{name} had a {colour} {thing}. {name} went to the {place} and saw a big {animal}. They were happy."
    for name, colour, thing, place, animal in [
        ("Tom", "red", "ball", "park", "dog"),
        ("Lily", "blue", "kite", "hill", "cat"),
        ("Ben", "green", "boat", "lake", "duck"),
        ("Mia", "yellow", "hat", "garden", "bird"),
        ("Sam", "small", "cup", "house", "mouse"),
    ]
]

SENTENCE = "Lily had a blue kite and saw a big cat."


def alter(shard: Path, at: int = 100) -> None:
    """Change one token of a shard; its size and its time stamp stay."""
    stat, data = shard.stat(), bytearray(shard.read_bytes())
    data[at] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def start_scripts(jobs: Iterable[Sequence[object]]) -> dict[str, dict]:
    """Start scripts with arguments, all in one other process; what each did is under its job as JSON.

    See tests/helpers/start_scripts.py: "status", "out", "err", and the "heavy" packages that it imports.
    """
    helper = ROOT / "tests/helpers/start_scripts.py"
    result = subprocess.run(
        [sys.executable, str(helper), *(json.dumps([str(word) for word in job]) for job in jobs)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def wait_until(is_so: Callable[[], object]) -> None:
    """Return once it is so; fail when it is not within the time that a very busy machine may need."""
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test that makes a symbolic link where Windows lets only administrators do so."""
    try:
        return (yield)
    except OSError as error:
        if getattr(error, "winerror", None) == 1314:  # ERROR_PRIVILEGE_NOT_HELD
            pytest.skip("making a symbolic link needs a privilege on Windows")
        raise


@pytest.fixture
def faults_of_new_memory() -> Callable[[], int]:
    """A function that returns how many pages a new tensor of 40 MB fetches: few where freed ones are kept.

    Before the test glibc is told to give them back, as it does by itself: then they are 10,000.
    """
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc is told to keep freed memory; this system has another C library")
    import resource

    import torch

    from litgpt_moe.hardware import mallopt

    def faults() -> int:
        counts = []
        for _ in range(16):  # at first remainders go to the thread's cache, and no block fits in again
            torch.ones(10_000_000)
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        return min(later - earlier for earlier, later in itertools.pairwise(counts))

    mallopt(mmap_max=65536, mmap_threshold=32 << 20, trim_threshold=64 << 20)
    if faults() < 1000:
        pytest.skip("memory comes in larger pages here, so few are fetched whether it is kept or not")
    return faults


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a full disk is a small file system here, and mounting one needs root on Linux")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a full disk is a small file system here, and this container may not mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def eager() -> Iterator[None]:
    """One thread, fixed seed and no compilation: compiling a whole model takes minutes on two cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def first_rank() -> Iterator[None]:
    """Lightning keeps the rank of the last Fabric in a global, which launchers' variables in a test set."""
    yield
    for name in ("lightning.fabric.utilities.rank_zero", "lightning_utilities.core.rank_zero"):
        if module := sys.modules.get(name):
            module.rank_zero_only.rank = 0


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-style BPE of at most 512 pieces with byte fallback, trained in-process."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    document = json.loads(tokenizer.to_str())
    # byte pieces are part of the vocabulary but not special: text that spells "<0x41>" must not become one
    document["added_tokens"] = [t for t in document["added_tokens"] if t["id"] < 3]
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


TINY_CONFIG = {
    "name": "MoE-tiny",
    "block_size": 64,
    "vocab_size": 512,
    "padded_vocab_size": 512,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMoE",
    "moe_intermediate_size": 8,
    "n_expert": 4,
    "n_expert_per_token": 2,
}


@pytest.fixture
def tiny_config():
    """A MoEConfig of two layers, C=16, E=4, K=2, T=64 and 512 words."""
    from litgpt_moe.config import MoEConfig

    return MoEConfig(**TINY_CONFIG)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A whole checkpoint directory with seeded random weights."""
    import torch
    from litgpt.model import GPT
    from litgpt.utils import copy_config_files, save_config

    from litgpt_moe.config import MoEConfig

    config = MoEConfig(**TINY_CONFIG)
    torch.manual_seed(1)
    model = GPT(config)
    folder = tmp_path_factory.mktemp("checkpoints") / "final"
    folder.mkdir()
    torch.save({"model": model.state_dict()}, folder / "lit_model.pth")
    save_config(config, folder)
    copy_config_files(tiny_tokenizer_dir, folder)
    return folder


DENSE_CONFIG = {
    **TINY_CONFIG,
    "name": "dense-tiny",
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 24,
    "n_expert": 0,
    "n_expert_per_token": 0,
    "moe_intermediate_size": None,
}


@pytest.fixture
def dense(tmp_path: Path, tiny_tokenizer_dir: Path) -> Callable[..., Path]:
    """A function that writes a dense checkpoint of random weights."""
    import torch
    from litgpt.model import GPT
    from litgpt.utils import copy_config_files, save_config

    from litgpt_moe.config import MoEConfig

    def make(dtype: "torch.dtype | None" = None, **changes: object) -> Path:
        config = MoEConfig(**{**DENSE_CONFIG, **changes})
        torch.manual_seed(1)
        model = GPT(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path / "dense"
        folder.mkdir()
        torch.save(model.to(dtype or torch.float32).state_dict(), folder / "lit_model.pth")
        save_config(config, folder)
        copy_config_files(tiny_tokenizer_dir, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def overfitted(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Callable[..., Path]:
    """A function that returns a checkpoint of a model that knows one text by heart: BOS, text, EOS."""
    import torch
    from litgpt.model import GPT
    from litgpt.utils import copy_config_files, save_config
    from tokenizers import Tokenizer

    from litgpt_moe.config import MoEConfig

    def overfit(text: str, **config: object) -> Path:
        torch.manual_seed(0)
        torch.set_num_threads(1)  # two wait for each other on a busy machine
        model = GPT(MoEConfig.from_file(tiny_checkpoint / "model_config.yaml", **config))
        tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
        ids = torch.tensor([[1, *tokenizer.encode(text).ids, 2]])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for _ in range(60):
            loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        folder = tmp_path_factory.mktemp("overfitted")
        torch.save({"model": model.state_dict()}, folder / "lit_model.pth")
        copy_config_files(tiny_checkpoint, folder)
        save_config(model.config, folder)
        return folder

    return overfit


@pytest.fixture(scope="session")
def storyteller(overfitted: Callable[..., Path]) -> Path:
    """A checkpoint overfitted to BOS + SENTENCE + EOS."""
    return overfitted(SENTENCE)


@pytest.fixture(scope="session")
def chatterbox(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A checkpoint with room for 4,096 tokens that never says EOS nor a byte piece."""
    import torch
    from litgpt.utils import copy_config_files

    folder = tmp_path_factory.mktemp("chatterbox")
    copy_config_files(tiny_checkpoint, folder)
    config = (folder / "model_config.yaml").read_text(encoding="utf-8")
    (folder / "model_config.yaml").write_text(
        config.replace("block_size: 64", "block_size: 4096"), encoding="utf-8"
    )
    state = torch.load(tiny_checkpoint / "lit_model.pth", weights_only=True)
    # pieces 0 to 258 are special tokens and bytes; of 253 other logits one is above zero
    state["model"]["lm_head.weight"][:259] = 0
    torch.save(state, folder / "lit_model.pth")
    return folder


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs one of our scripts as a user would, in a process of its own, offline."""

    def run(script: str, *args: object, env: dict[str, str] | None = None, cwd: Path | None = None, **kwargs):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)],
            env={**os.environ, **OFFLINE, **(env or {})},
            cwd=cwd or ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=240,
            **kwargs,
        )

    return run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A prepared data directory: about 6,000 training tokens in 300 different stories, and a val split."""

    folder = tmp_path_factory.mktemp("data") / "custom_text"
    names = [f"{a}{b}" for a in ("Al", "Bo", "Ce", "Da", "El", "Fi") for b in ("na", "ra", "lo", "mi", "ke")]
    stories = [
        f"{sentence} {name} liked that."
        for i, name in enumerate(names)
        for sentence in (SENTENCES if i % 2 else SENTENCES[::-1])
    ]
    for split, part in (("train", stories[:120]), ("val", stories[120:])):
        (folder / split).mkdir(parents=True)
        text = "".join(f"{story}\n<|endoftext|>\n" for story in part)
        (folder / split / "stories.txt").write_text(text, encoding="utf-8")
    settings = PrepareSettings(data_dir=folder, tokenizer_dir=tiny_tokenizer_dir, workers=1)
    prepare(settings)
    return folder


@pytest.fixture
def workspace(
    tmp_path: Path, tiny_data: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder to run in: model and train settings for the tiny data, eight steps of 4 x 64 tokens."""
    from litgpt_moe.training.sources import VARIABLES

    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "model_config.yaml").write_text(yaml.dump(TINY_CONFIG), encoding="utf-8")
    settings = {
        "out_dir": "out",
        "accelerator": "cpu",
        "precision": "32-true",
        "tokenizer_dir": str(tiny_tokenizer_dir),
        "data": {
            "class_path": "prepare_data.TextShards",
            "init_args": {
                "train_data_path": str(tiny_data / "train"),
                "val_data_path": str(tiny_data / "val"),
            },
        },
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_tokens": 8 * 4 * 64,
            "max_norm": 1.0,
            "min_lr": 1e-4,
            "lr_warmup_steps": 2,
            "save_interval": 4,
        },
        "eval": {"interval": 4, "max_iters": 2},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}},
    }
    (tmp_path / "train_config.yaml").write_text(yaml.dump(settings), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="session")
def llama_style(tiny_tokenizer_dir: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tiny_tokenizer_dir / "tokenizer.json"))


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Have something happen while a step is computed, as a signal does."""
    from litgpt_moe.training.guard import Guard

    def schedule(step: int, act: Callable[[], object]) -> None:
        count_bad, calls = Guard.count_bad, []

        def watched(guard: Guard, loss: float, norm: float) -> bool:
            calls.append(loss)
            if len(calls) == step:
                act()
            return count_bad(guard, loss, norm)

        monkeypatch.setattr(Guard, "count_bad", watched)

    return schedule
