"""Continue a text with a trained checkpoint, word by word as the model finds them.

Run: uv run python generate.py --prompt "Once upon a time"
(10 s to import and load, then about 60 tokens/s with MoE-200M on one CPU core)

Standard output carries the text alone: prompt and continuation; with --num_samples above 1 a line
`<|endoftext|>` stands between the texts, as prepare_data.py reads them. Everything else goes to stderr.
"""

import argparse
import errno
import io
import math
import os
import queue
import re
import select
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from wandb_dataset import normalize_flags

if TYPE_CHECKING:
    import tokenizers
    import torch
    from litgpt.model import GPT
    from litgpt.tokenizer import Tokenizer

DEFAULT_PROMPT = "Once upon a time"
SEPARATOR = "<|endoftext|>"
NOT_A_NUMBER = (
    "the model's logits are NaN; use an earlier checkpoint (or --precision 32-true, if it was 16-true)"
)
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
REPLACEMENT = "\ufffd"  # what decoders show for bytes that are no (or not yet a whole) character
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def setting(default: float, text: str) -> Any:  # Any: a field stands where its value's type is declared
    """Return a dataclass field that carries the text of its `--help`."""
    return field(default=default, metadata={"help": f"{text} (default {default})"})


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the values are checked when it is made."""

    temperature: float = setting(0.8, "divides the logits: below 1 safer, above 1 wilder, 0 = greedy")
    top_k: int = setting(50, "draw from this many likeliest tokens, 0 = off")
    top_p: float = setting(1.0, "draw from the fewest likeliest tokens with this much probability, 1.0 = off")
    min_p: float = setting(0.0, "drop tokens below this fraction of the likeliest one's probability, 0 = off")
    repetition_penalty: float = setting(
        1.0, "make tokens that occurred less likely, 1.2 is strong, 1.0 = off"
    )

    def __post_init__(self) -> None:
        rules = [
            (
                "temperature",
                self.temperature == 0 or 1e-3 <= self.temperature < math.inf,
                "0 (greedy) or 0.001 or more",
            ),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 1e-12 <= self.top_p <= 1, "above 0 and up to 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty < math.inf, "0.001 or more (1 = off)"),
        ]
        problems = [f"{name} is {getattr(self, name)}; choose {rule}" for name, ok, rule in rules if not ok]
        if problems:
            raise ValueError("\n".join(problems))


# --- from logits to a token ---------------------------------------------------------------------------------


def candidates(
    logits: "torch.Tensor", sampling: Sampling, seen: "torch.Tensor | None" = None
) -> "tuple[torch.Tensor, torch.Tensor | None]":
    """Return the tokens' relative probabilities and the ids they belong to (None: id i is at place i).

    Applied in this order: repetition penalty (CTRL, section 4.1, arxiv.org/abs/1909.05858; negative logits
    are multiplied, as Hugging Face does), temperature, top_k, top_p (nucleus, arxiv.org/abs/1904.09751),
    min_p (arxiv.org/abs/2407.01082). `logits` is (V,), `seen` is (V,), true for tokens that occurred.
    """
    scores, ids = logits.float(), None
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        scores = scores.where(~seen, (scores / penalty).where(scores > 0, scores * penalty))
    if sampling.temperature == 0:
        return scores.new_ones(1), scores.argmax(dim=-1, keepdim=True)
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.size(0):
        scores, ids = scores.topk(sampling.top_k)
    probs = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        if ids is None:
            probs, ids = _likeliest(probs, sampling.top_p)
        # a token stays while those before it fall short of top_p: the first always does
        probs = probs.where(probs.cumsum(-1) - probs < sampling.top_p, 0.0)
    if sampling.min_p > 0:
        probs = probs.where(probs >= sampling.min_p * probs.max(), 0.0)
    return probs, ids


def _likeliest(probs: "torch.Tensor", mass: float) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the likeliest tokens' probabilities, falling, that sum to `mass` or more, and their ids."""
    # the first 1,024 nearly always have it, and sorting all 32,000 words costs more than twice as much
    values, ids = probs.topk(min(1024, probs.size(0)))
    return (values, ids) if values.sum() >= mass else probs.sort(descending=True)


def sample(
    logits: "torch.Tensor",
    sampling: Sampling,
    generator: "torch.Generator | None" = None,
    seen: "torch.Tensor | None" = None,
) -> int:
    """Return the id of the next token, drawn from `logits` (V,) by `sampling`."""
    import torch

    probs, ids = candidates(logits, sampling, seen)
    place = torch.multinomial(probs, 1, generator=generator) if probs.numel() > 1 else 0
    return int(place if ids is None else ids[place])


# --- from tokens to more tokens -----------------------------------------------------------------------------


def room_for(prompt_ids: Sequence[int], max_tokens: int, block_size: int) -> int:
    """Return how many of `max_tokens` new tokens fit; ValueError when the prompt leaves no room at all."""
    if not prompt_ids:
        raise ValueError("the prompt holds no token and this tokenizer has no BOS; give a --prompt with text")
    if len(prompt_ids) >= block_size:
        raise ValueError(
            f"the prompt has {len(prompt_ids):,} tokens but the model's block_size is {block_size:,}; "
            f"shorten it to {block_size - 1:,} tokens or fewer"
        )
    return min(max_tokens, block_size - len(prompt_ids))


def generate(
    model: "GPT",
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    eos_id: int | None = None,
    generator: "torch.Generator | None" = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` new token ids, stopping before `eos_id` and when the context is full.

    Several such iterators can take turns on one model: each brings its own KV cache to its steps.
    """
    import torch

    sampling = sampling or Sampling()
    count = room_for(prompt_ids, max_tokens, model.max_seq_length)
    weight = model.lm_head.weight
    device, ids = weight.device, torch.tensor([list(prompt_ids)], device=weight.device)
    position = torch.arange(ids.size(1), device=device)
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(model.config.padded_vocab_size, dtype=torch.bool, device=device)
    try:
        model.set_kv_cache(1, max_seq_length=ids.size(1) + count, device=device, dtype=weight.dtype)
        attentions = [block.attn for block in model.transformer.h]
        mask, caches = model.mask_cache, [attention.kv_cache for attention in attentions]
        for end in range(ids.size(1), ids.size(1) + count):
            model.mask_cache = mask
            for attention, cache in zip(attentions, caches, strict=True):
                attention.kv_cache = cache
            # entered for each token: a generator that waits inside it would switch its caller's mode too
            with torch.inference_mode():
                if seen is not None:
                    seen[ids] = True
                # the last row alone is wanted, and `end` lets attention skip the empty part of the cache
                logits = model(ids, position, input_pos_maxp1=end)[0, -1]
                if logits.isnan().any():
                    raise ValueError(NOT_A_NUMBER)
                token = sample(logits, sampling, generator, seen)
            if token == eos_id:
                return
            yield token
            ids, position = torch.tensor([[token]], device=device), position[-1:] + 1
    finally:
        model.clear_kv_cache()


def lay_out_for_decoding(model: "GPT") -> None:
    """Reorder the weights in memory for one-token steps on a CPU; shapes, values and names stay.

    A step is bound by reading the weights. As (in, out) in memory MKL reads them at 17 to 26 GB/s on an AMD
    EPYC core, as (out, in) at 10 (torch 2.10, tools/benchmark_generate.py).
    """
    import torch

    from moe_layers import moe_layers

    for layer in moe_layers(model).values():
        layer.pack_for_decoding()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.is_contiguous():
            module.weight.data = module.weight.data.t().contiguous().t()


# --- from tokens to text ------------------------------------------------------------------------------------


class TextDecoder:
    """Token ids in, finished text out; the pieces joined are the tokenizer's decoding of the whole.

    Not `tokenizers.decoders.DecodeStream`: as of tokenizers 0.23 it raises "Invalid prefix" when bytes that
    follow a finished emoji turn out invalid (the whole run of byte pieces is then shown as U+FFFD), and it
    keeps back an unfinished character for ever. Constant work per token: only a short window is decoded.
    """

    CONTEXT = 4  # tokens kept before the new ones: a character has at most four bytes
    LONGEST = 16  # a window this long is cut although its end looks unfinished: it is text of U+FFFD

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that are out already

    def put(self, token_id: int) -> str:
        """Return the text that this token finished, perhaps none."""
        piece = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if piece is None:  # never shown, and no first token either (whose leading space is stripped)
            return ""
        self._window.append(token_id)
        if BYTE_PIECE.fullmatch(piece):
            return ""  # one invalid byte spoils its whole run, so the run's text is known at its end
        text = self._tokenizer.decode(self._window)
        stable = text.removesuffix(REPLACEMENT)
        new, self._shown = stable[self._shown :], len(stable)
        if stable == text or len(self._window) > self.LONGEST:
            self._window = self._window[-self.CONTEXT :]
            self._shown = len(self._tokenizer.decode(self._window).removesuffix(REPLACEMENT))
        return new

    def end(self) -> str:
        """Return what was kept back; bytes that never became a character are U+FFFD."""
        new = self._tokenizer.decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return new


class AsyncTokenStreamer:
    """Write tokens as text from a thread of its own, so that the model never waits for the terminal.

    Use it as a context manager: leaving it, by Ctrl-C too, writes what is queued and kept back. An error of
    the thread (a closed pipe, a full disk) is raised by the next `put` or `end`.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", out: TextIO | None = None) -> None:
        self._decoder = TextDecoder(tokenizer)
        self._out = sys.stdout if out is None else out
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="token-streamer", daemon=True)
        self._thread.start()

    def put(self, token_id: int) -> None:
        """Queue one token; raises what went wrong with those before it."""
        self._raise_error()
        self._queue.put(token_id)

    def end(self) -> None:
        """Write everything that is left and wait until it is out; further calls do nothing."""
        self._queue.put(None)
        self._thread.join()
        self._raise_error()

    def __enter__(self) -> "AsyncTokenStreamer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with (
            suppress(OSError) if kind else nullcontext()
        ):  # the error that brought us here is the one to tell
            self.end()

    def _run(self) -> None:
        try:
            while (token_id := self._queue.get()) is not None:
                self._write(self._decoder.put(token_id))
            self._write(self._decoder.end())
        except Exception as error:  # handed to the main thread, whatever it is
            self._error = error

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


# --- the command line ---------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags, hyphens and underscores alike; an unknown one ends with status 2."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Continue a text with a trained checkpoint.",
        usage="%(prog)s [--prompt TEXT | --prompt_file FILE] [options]",
        epilog="stdout carries prompt and continuation, a line <|endoftext|> between samples.",
    )
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    default = f"default: what is piped in, else {DEFAULT_PROMPT!r}"
    source.add_argument("--prompt", metavar="TEXT", help=f"text to continue, - = standard input ({default})")
    source.add_argument("--prompt_file", metavar="FILE", type=Path, help="UTF-8 text to continue")
    where = "checkpoint, or the folder of its final/ or step-*/"
    add("--ckpt_dir", type=Path, default=Path("checkpoints"), help=f"{where} (default %(default)s)")
    add("--max_tokens", type=int, default=200, help="new tokens at most (default %(default)s)")
    for option in fields(Sampling):
        add(f"--{option.name}", type=option.type, default=option.default, help=option.metadata["help"])
    add("--num_samples", type=int, default=1, help="texts to write (default %(default)s)")
    add("--seed", type=int, help="0 or more, repeats a run (default: a fresh one, told on stderr)")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    add(
        "--precision",
        default="auto",
        help="auto (bf16-true on CUDA, else 32-true), 32-true, bf16-true, 16-true",
    )
    return parser.parse_args(normalize_flags(sys.argv[1:] if argv is None else argv))


def check_args(args: argparse.Namespace) -> Sampling:
    """Return the sampling settings; ValueError tells every value that is out of range."""
    rules = [
        ("max_tokens", args.max_tokens >= 1, "1 or more"),
        ("num_samples", args.num_samples >= 1, "1 or more"),
        ("seed", args.seed is None or 0 <= args.seed < 2**63, "0 or more"),
    ]
    problems = [f"{name} is {getattr(args, name)}; choose {rule}" for name, ok, rule in rules if not ok]
    try:
        sampling = Sampling(**{option.name: getattr(args, option.name) for option in fields(Sampling)})
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return sampling


def read_prompt(args: argparse.Namespace) -> str:
    """Return the text to continue: --prompt, --prompt_file, standard input, or the default."""
    if args.prompt_file is not None:
        return _utf8(args.prompt_file.read_bytes(), str(args.prompt_file))
    if args.prompt == "-" or (args.prompt is None and _is_piped_in()):
        text = _utf8(sys.stdin.buffer.read(), "standard input")
        return text or (DEFAULT_PROMPT if args.prompt is None else "")
    return DEFAULT_PROMPT if args.prompt is None else _utf8(os.fsencode(args.prompt), "--prompt")


def _utf8(data: bytes, place: str) -> str:
    try:  # a file's last line break is the editor's, not the author's
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 at byte {error.start:,}; save it as UTF-8") from None


def _is_piped_in() -> bool:
    """Return whether standard input is a file, or a pipe with content (an idle one would block for ever)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no standard input, or a closed or replaced one
        return False
    if stat.S_ISFIFO(mode) and os.name == "posix":  # Windows cannot wait on a pipe; --prompt - reads it
        return bool(select.select([sys.stdin], [], [], 0.5)[0])
    return stat.S_ISREG(mode)


def load(args: argparse.Namespace, prompt: str) -> "tuple[GPT, Tokenizer, list[int]]":
    """Return the checkpoint's model, its tokenizer and the prompt's token ids."""
    from moe_layers import find_checkpoint, load_model, pick_device, verify_checkpoint

    device, dtype = pick_device(args.device, args.precision)
    folder = find_checkpoint(args.ckpt_dir)
    verify_checkpoint(folder)
    tokenizer = read_tokenizer(folder)
    print(f"checkpoint {folder} on {device} in {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    model = load_model(folder, device, dtype)
    if device.type == "cpu":
        lay_out_for_decoding(model)
    prompt_ids = tokenizer.encode(prompt).tolist()
    room_for(prompt_ids, args.max_tokens, model.max_seq_length)
    if max(prompt_ids) >= model.config.padded_vocab_size:
        size = f"token {max(prompt_ids):,}, the model knows {model.config.padded_vocab_size:,}"
        raise ValueError(f"{folder}: the tokenizer is not the model's ({size}); copy in the right one")
    return model, tokenizer, prompt_ids


def read_tokenizer(folder: Path) -> "Tokenizer":
    """Return the checkpoint's tokenizer; one sentence when it is missing or damaged."""
    from litgpt.tokenizer import Tokenizer

    way_out = "copy in the files of the tokenizer it was trained with"
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; {way_out}")
    try:
        return Tokenizer(folder)
    except Exception as error:  # tokenizers raises plain Exception, LitGPT KeyError and others
        raise ValueError(f"{folder}: its tokenizer files cannot be read ({error}); {way_out}") from error


def write_sample(
    model: "GPT",
    tokenizer: "Tokenizer",
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    generator: "torch.Generator | None" = None,
) -> int:
    """Write prompt and continuation to stdout as they come; return the number of new tokens."""
    started, first_s, count = time.perf_counter(), 0.0, 0
    new_ids = generate(model, prompt_ids, max_tokens, sampling, tokenizer.eos_id, generator)
    try:
        with AsyncTokenStreamer(tokenizer.processor) as streamer:
            for token_id in prompt_ids:
                streamer.put(token_id)
            for token_id in new_ids:
                count += 1
                first_s = first_s or time.perf_counter() - started
                streamer.put(token_id)
        print(flush=True)
    finally:  # told after Ctrl-C, too
        seconds = time.perf_counter() - started
        rate = f"{count / seconds:.1f} tokens/s, the first after {first_s:.2f} s"
        print(f"{count} new tokens in {seconds:.1f} s, {rate}", file=sys.stderr)
    if count < max_tokens and len(prompt_ids) + count == model.max_seq_length:
        print(f"stopped: the context of {model.max_seq_length:,} tokens is full", file=sys.stderr)
    return count


def write_samples(args: argparse.Namespace, sampling: Sampling, loaded: tuple) -> None:
    """Write the samples that the flags ask for, one after the other, each from the next seed."""
    import torch

    model, tokenizer, prompt_ids = loaded
    generator = torch.Generator(model.lm_head.weight.device)
    seed = generator.seed() % 2**32 if args.seed is None else args.seed
    for number in range(args.num_samples):
        if number:
            print(SEPARATOR, flush=True)
        generator.manual_seed(seed + number)  # so that each can be had alone, and all side by side
        if sampling.temperature > 0:
            print(f"seed {seed + number}", file=sys.stderr)
        write_sample(model, tokenizer, prompt_ids, args.max_tokens, sampling, generator)


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad settings or input, 130 after Ctrl-C."""
    args = parse_args(argv)
    try:
        sampling, prompt = check_args(args), read_prompt(args)
        loaded = load(args, prompt)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # a Windows console's own encoding lacks most characters
    try:
        write_samples(args, sampling, loaded)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        return _output_failed(error)
    return 0


def _output_failed(error: OSError) -> int:
    """Return 0 where the reader has seen enough (`| head`) and 1 where the text could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
    if error.errno in (errno.EPIPE, errno.EINVAL):  # Windows says EINVAL for a closed pipe
        return 0
    print(f"error: the text could not be written ({error}); free space or write elsewhere", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
