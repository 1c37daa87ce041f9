"""What generate.py times: our engines, stock LitGPT, and llama.cpp, all with the same weights."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import tokenizers
import torch
from litgpt.config import Config
from litgpt.generate.base import generate_fn
from litgpt.model import GPT
from tokenizers import AddedToken, decoders, models, normalizers

from litgpt_moe.checkpoints.layout import CONFIG_FILE
from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.config import MoEConfig
from litgpt_moe.generation.decode import Batch, Continuation, lay_out_for_decoding, make_decoder
from litgpt_moe.generation.decoder import Decoder
from litgpt_moe.generation.settings import Sampling
from litgpt_moe.interop.gguf import write_gguf
from litgpt_moe.interop.transformers import to_hf_weights

WORKER = "import sys, llama_worker; sys.exit(llama_worker.serve(*sys.argv[1:]))"
GREEDY = Sampling(temperature=0.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Round:
    """One timed run: seconds for all tokens, seconds to the first of all, and each text's new tokens."""

    seconds: float
    first_s: float | None = None
    tokens: list[list[int]] = field(default_factory=list)


class Contestant(Protocol):
    """Continues prompts greedily by `n` tokens each, all at once."""

    def run(self, prompts: list[list[int]], n: int) -> Round:
        """Return what it took."""
        ...


@dataclass
class Ours:
    """One of our decoders."""

    decoder: Decoder

    def run(self, prompts: list[list[int]], n: int) -> Round:
        """Return what it took; the texts advance together."""
        together, first = Batch(self.decoder), None
        started = time.perf_counter()
        members = [Continuation(prompt, n, GREEDY) for prompt in prompts]
        tokens: dict[Continuation, list[int]] = {member: [] for member in members}
        for member in members:
            together.join(member)
        while together.members:
            for advance in together.step():
                if advance.token is not None:
                    tokens[advance.member].append(advance.token)
                    first = first or time.perf_counter() - started
        return Round(time.perf_counter() - started, first, list(tokens.values()))


@dataclass
class Stock:
    """Stock LitGPT, called as `litgpt generate` calls it: one text after the other."""

    model: GPT

    def run(self, prompts: list[list[int]], n: int) -> Round:
        """Return what it took."""
        started, tokens = time.perf_counter(), []
        for prompt in prompts:
            self.model.max_seq_length = total = len(prompt) + n
            self.model.set_kv_cache(batch_size=1)
            ids = torch.tensor(prompt)
            steps = generate_fn(
                self.model, ids, total, temperature=0.0, include_prompt=False, include_eos=True
            )
            tokens.append([int(token) for token in steps])
        return Round(time.perf_counter() - started, None, tokens)


class LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, python: Path, gguf: Path, n_threads: int, batch: int, context: int) -> None:
        words = [Path(python).absolute(), "-c", WORKER, gguf.absolute(), n_threads, batch, context]
        pipe, folder = subprocess.PIPE, Path(__file__).parent
        self._process = subprocess.Popen(
            [str(w) for w in words], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=folder
        )
        self.version = self._answer()["xllamacpp"]

    def run(self, prompts: list[list[int]], n: int) -> Round:
        """Return what it took."""
        print(json.dumps({"prompts": prompts, "n": n}), file=self._process.stdin, flush=True)
        return Round(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp's process has ended")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait(timeout=30)


def build(config_file: Path, ckpt_dir: Path | None, seed: int) -> GPT:
    """Return the model on the CPU in float32: a checkpoint's, or with seeded random weights."""
    if ckpt_dir is not None:
        return load_model(ckpt_dir, "cpu", torch.float32)
    torch.manual_seed(seed)
    model = GPT(MoEConfig.from_file(config_file)).requires_grad_(False).eval()
    model.apply(model._init_weights)  # LitGPT's own; torch's default makes all logits nearly equal
    return model


def copy_of(model: GPT, model_class: type[GPT], config: Config, dtype: torch.dtype) -> GPT:
    """Return a copy of a model in another class, configuration or dtype."""
    with torch.device("meta"):
        copied = model_class(config)
    weights = {name: weight.to(dtype, copy=True) for name, weight in model.state_dict().items()}
    copied.load_state_dict(weights, assign=True)
    copied.cos, copied.sin = copied.rope_cache(device=torch.device("cpu"))
    return copied.requires_grad_(False).eval()


def our_contestants(model: GPT, config_file: Path) -> dict[str, Contestant]:
    """Return stock LitGPT and our engines by name and precision."""
    found: dict[str, Contestant] = {}
    stock = copy_of(model, GPT, Config(**asdict(model.config)), torch.float32)
    found["stock float32"] = Stock(stock)
    plain = copy_of(model, GPT, MoEConfig.from_file(config_file), torch.float32)
    lay_out_for_decoding(plain)
    found["torch float32"] = Ours(make_decoder(plain, "torch"))
    for name, dtype in DTYPES.items():
        copied = copy_of(model, GPT, MoEConfig.from_file(config_file), dtype)
        found[f"native {name}"] = Ours(make_decoder(copied, "native"))
    found["native int8"] = Ours(make_decoder(model, "native", quantize=True))
    return found


# --- llama.cpp ----------------------------------------------------------------------------------------------


def make_llama_environment(folder: Path) -> Path:
    """Return the Python of an environment with the newest xllamacpp, made by uv if it is absent."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        print(f"Making {folder} with the newest xllamacpp...", file=sys.stderr)
        subprocess.run(["uv", "venv", "-q", "--python", "3.12", str(folder)], check=True)
        subprocess.run(["uv", "pip", "install", "-q", "--python", str(python), "xllamacpp"], check=True)
    return python


def write_ggufs(model: GPT, ckpt_dir: Path | None, folder: Path) -> dict[str, Path]:
    """Write the model as GGUF files in three precisions; return their paths by name."""
    tokenizer_dir = ckpt_dir or folder
    if ckpt_dir is None:
        write_tokenizer(model.config.padded_vocab_size or 0, folder)
    config = model.config
    assert isinstance(config, MoEConfig)
    weights, paths = to_hf_weights(config, model.state_dict()), {}
    for name, kind in (("float32", "f32"), ("bfloat16", "bf16"), ("q8_0", "q8_0")):
        paths[name] = folder / f"{kind}.gguf"
        write_gguf(paths[name], config, weights, tokenizer_dir, kind)
    return paths


def write_tokenizer(n_pieces: int, folder: Path) -> None:
    """Write a Llama-style tokenizer of that many pieces, which mean nothing: a GGUF file must have one."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    vocabulary |= {f"w{number}": number for number in range(len(pieces), n_pieces)}
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(piece, special=True) for piece in special])
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "tokenizer_class": "Llama"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@contextmanager
def llama_contestants(
    python: Path, ggufs: dict[str, Path], n_threads: int, batch: int, context: int
) -> Iterator[dict[str, Contestant]]:
    """In the block, llama.cpp runs with each file, in a process for each."""
    with ExitStack() as stack:
        found: dict[str, Contestant] = {}
        for name, path in ggufs.items():
            found[f"llama.cpp {name}"] = contestant = LlamaCpp(python, path, n_threads, batch, context)
            stack.callback(contestant.close)
        yield found


def config_of(config: Path, ckpt_dir: Path | None) -> Path:
    """Return the file with the configuration of what is timed."""
    return ckpt_dir / CONFIG_FILE if ckpt_dir else config
