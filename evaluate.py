"""Score a checkpoint on a whole split or on text files: loss, perplexity, bits per byte, load per expert.

Run: uv run python evaluate.py --ckpt_dir checkpoints      (20 s after the demo run on two CPU cores)

How it counts: the tokens, in order, are cut into windows of T inputs (T = block_size), the last one short.
Every token but the very first is predicted exactly once, from the tokens before it in its window. Loss is
the mean over those predictions, BOS and EOS among them, in nats per token. Its standard error comes from
the spread of the windows' means, weighted by length. Bits per byte is all nats over the bytes of the text.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from litgpt_moe.cli import FlagParser, hear_ctrl_c, run_script
from litgpt_moe.files import sha256_file
from prepare_data import (
    SPLITS,
    StoryEncoder,
    TextReader,
    TokenStream,
    read_manifest,
    read_tokenizer,
    stale_reasons,
)
from wandb_dataset import find_tokenizer, manifest_fingerprint

if TYPE_CHECKING:
    import torch
    from litgpt import GPT

CHECKPOINTS = Path("checkpoints")
RANDOM_WARNING = "Warning: Evaluating random weights!"


class EvaluationError(RuntimeError):
    """The evaluation itself failed; the text is one sentence for the user."""


@dataclass
class Corpus:
    """A stream of token ids to score."""

    read: Callable[[int, int], np.ndarray]
    """Returns the token ids from start to stop, int64."""
    n_tokens: int
    n_bytes: int
    """UTF-8 bytes of the whole stream's text."""
    vocab_size: int
    tokenizer_dir: Path
    identity: dict
    """What is recorded about the text beside the result."""


# --- what to score ------------------------------------------------------------------------------------------


def split_corpus(data_dir: Path, split: str, tokenizer_dir: Path) -> Corpus:
    """Return a prepared split; ValueError where another tokenizer or an older text made it."""
    manifest = read_manifest(data_dir)
    facts = manifest["tokenizer"]
    if sha256_file(tokenizer_dir / "tokenizer.json") != facts["sha256"]:
        raise ValueError(
            f"{data_dir}: tokenized with another tokenizer than the one in {tokenizer_dir}; "
            f"run prepare_data.py --tokenizer_dir {tokenizer_dir}, or score text files with --text"
        )
    if reasons := stale_reasons(data_dir, tokenizer_dir):
        raise ValueError(f"{data_dir}: {reasons[0]}; run prepare_data.py on that folder again")
    stream = TokenStream(data_dir, split)
    if len(stream) < 2:
        raise ValueError(f"{data_dir}: the {split} split has {len(stream)} tokens; scoring needs 2 or more")
    n_bytes = manifest["splits"][split]["n_bytes"]
    identity = {"data_dir": str(data_dir), "split": split, "fingerprint": manifest_fingerprint(manifest)}
    return Corpus(stream.read, len(stream), n_bytes, facts["vocab_size"], tokenizer_dir, identity)


def text_corpus(paths: list[Path], tokenizer_dir: Path) -> Corpus:
    """Return the stories of plain text files one after another, each BOS ... EOS as in the shards."""
    encoder = StoryEncoder(read_tokenizer(tokenizer_dir))
    ids, n_bytes = [], 0
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such text file")
        before = len(ids)
        with tqdm(disable=True) as progress:
            for stories in TextReader(path, "<|endoftext|>", "replace").story_lists(progress):
                ids += map(encoder.encode, stories)
                n_bytes += sum(len(story.encode()) for story in stories)
        if len(ids) == before:
            raise ValueError(f"{path}: holds no text; name a UTF-8 text file with at least one word")
    stream = np.concatenate(ids)
    identity = {"text": [{"path": str(path), "sha256": sha256_file(path)} for path in paths]}

    def read(start: int, stop: int) -> np.ndarray:
        return stream[start:stop]

    return Corpus(read, len(stream), n_bytes, encoder.facts.vocab_size, tokenizer_dir, identity)


def bytes_of_first(corpus: Corpus, n_tokens: int) -> int:
    """Return the UTF-8 bytes of the text that the first `n_tokens` stand for."""
    if n_tokens >= corpus.n_tokens:
        return corpus.n_bytes
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_dir / "tokenizer.json"))
    ids = corpus.read(0, n_tokens)
    # story by story, because the decoder drops the space that stands for the beginning of a text
    stories = np.split(ids, np.flatnonzero(ids == read_tokenizer(corpus.tokenizer_dir).bos_id))
    *whole, last = tokenizer.decode_batch([story.tolist() for story in stories])
    kept = last.rstrip("\ufffd")  # a character cut at the end decodes to one U+FFFD for each of its bytes
    return sum(len(text.encode()) for text in (*whole, kept)) + len(last) - len(kept)


# --- the model ----------------------------------------------------------------------------------------------


def random_model(config_path: Path, seed: int, device: "torch.device", dtype: "torch.dtype") -> "GPT":
    """Return the model as LitGPT initialises it before the first training step."""
    from types import SimpleNamespace

    import torch
    from litgpt.model import GPT
    from litgpt.pretrain import initialize_weights

    from moe_layers import MoEConfig

    config = MoEConfig.from_file(config_path)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(config)
        # of the Fabric it reads only whether the strategy is FSDP (litgpt 0.5.13)
        initialize_weights(SimpleNamespace(strategy=None), model, config.n_layer, config.n_embd)
    return model.requires_grad_(False).to(device, dtype).eval()


def pick_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint directory, None for random weights; a named one that is not there is an error."""
    if args.random_weights:
        return None
    from moe_layers import find_checkpoint, verify_checkpoint

    try:
        folder = find_checkpoint(args.ckpt_dir or CHECKPOINTS)
    except FileNotFoundError:
        if args.ckpt_dir:
            raise
        return None
    verify_checkpoint(folder)
    return folder


def describe_checkpoint(folder: Path) -> dict:
    """Return what identifies a checkpoint: path, step where it is known, hash of the weights."""
    from moe_layers import CHECKPOINT_FILE, read_state, sha256_of

    path = folder / CHECKPOINT_FILE
    step, stat = read_state(path).get("step_count"), path.stat()
    step = step if isinstance(step, int) else None
    return {"path": str(folder), "step": step, "sha256": sha256_of(path, stat.st_size, stat.st_mtime_ns)}


# --- scoring ------------------------------------------------------------------------------------------------


def iter_batches(corpus: Corpus, window: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yield (B, window + 1) ids; a row's last is the next row's first. The last, short window comes alone."""
    n_whole = (corpus.n_tokens - 1) // window
    for first in range(0, n_whole, batch_size):
        last = min(first + batch_size, n_whole)
        ids = corpus.read(first * window, last * window + 1)
        yield np.lib.stride_tricks.sliding_window_view(ids, window + 1)[::window]
    if n_whole * window < corpus.n_tokens - 1:
        yield corpus.read(n_whole * window, corpus.n_tokens)[None]


def take_off_head(model: "GPT") -> "Callable[[torch.Tensor], torch.Tensor]":
    """Make `model` return hidden states, and return the function from these to float32 logits."""
    import torch
    from litgpt.model import do_softcapping

    head, cap = model.lm_head, model.config.final_logit_softcapping
    model.lm_head, model.config.final_logit_softcapping = torch.nn.Identity(), None

    def logits(hidden: "torch.Tensor") -> "torch.Tensor":
        raw = head(hidden).float()
        return raw if cap is None else do_softcapping(raw, cap)

    return logits


def window_nats(model: "GPT", logits: Callable, ids: "torch.Tensor") -> list[float]:
    """Return the summed cross-entropy of each row of `ids`, (B, T+1); `logits` is from `take_off_head`."""
    import torch
    from torch.nn.functional import cross_entropy

    from moe_layers import chunk_rows

    hidden, targets = model(ids[:, :-1]), ids[:, 1:]
    rows = chunk_rows(ids.device, model.config.padded_vocab_size)  # all at once they would be gigabytes
    parts = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    nats = torch.cat([cross_entropy(logits(x), y, reduction="none") for x, y in parts])
    # float64: the rounding of ten million float32 additions would show
    return nats.view(targets.shape).cpu().double().sum(dim=1).tolist()


def score(
    model: "GPT", corpus: Corpus, window: int, batch_size: int = 8, max_batches: int | None = None
) -> dict:
    """Return the figures of `summarize`, the speed and the experts' load; `model` loses its head by it."""
    import torch

    from moe_layers import count_expert_load, expert_load

    vocab, device = model.config.padded_vocab_size, model.lm_head.weight.device
    logits = take_off_head(model)
    count_expert_load(model, True)
    nats, lengths, start = [], [], time.perf_counter()
    batches = islice(iter_batches(corpus, window, batch_size), max_batches and min(max_batches, sys.maxsize))
    with torch.inference_mode(), tqdm(total=corpus.n_tokens - 1, unit=" tokens", disable=None) as progress:
        for batch in batches:
            if batch.max() >= vocab:
                raise EvaluationError(f"the data hold token {batch.max()} but the model knows {vocab}")
            try:
                nats += window_nats(model, logits, torch.from_numpy(batch.copy()).to(device))
            except torch.OutOfMemoryError:
                raise EvaluationError(f"no memory for --batch_size {batch_size}; choose less") from None
            lengths += [batch.shape[1] - 1] * batch.shape[0]
            progress.update(batch.size - batch.shape[0])
    seconds = time.perf_counter() - start
    load = {layer: tokens.long().tolist() for layer, tokens in expert_load(model).items()}
    figures = summarize(np.array(nats), np.array(lengths), bytes_of_first(corpus, sum(lengths) + 1))
    return {**figures, "tokens_per_s": figures["n_tokens"] / seconds, "seconds": seconds, "expert_load": load}


def summarize(nats: np.ndarray, lengths: np.ndarray, n_bytes: int) -> dict:
    """Return loss, standard error, perplexity and bits per byte of windows with these nats and lengths."""
    total, n_tokens, n_windows = float(nats.sum()), int(lengths.sum()), len(nats)
    loss = total / n_tokens
    if not math.isfinite(loss):
        raise EvaluationError(f"the loss is {loss}: damaged weights, or --precision too narrow; try 32-true")
    stderr = None  # unknown for one window
    if n_windows > 1:  # of a ratio of two sums: Cochran, Sampling Techniques, eq. 2.39
        deviations = nats - loss * lengths
        stderr = math.sqrt((deviations**2).sum() * n_windows / (n_windows - 1)) / n_tokens
    return {
        "loss": loss,
        "loss_stderr": stderr,
        "perplexity": math.exp(min(loss, 700.0)),  # exp overflows at 709
        "bits_per_byte": total / math.log(2) / n_bytes,
        "total_nats": total,
        "n_tokens": n_tokens,
        "n_bytes": n_bytes,
        "n_windows": n_windows,
    }


# --- the command line ---------------------------------------------------------------------------------------


def report(result: dict) -> str:
    """Return the result as the lines that a person reads."""
    checkpoint, data = result["checkpoint"], result["data"]
    model = f"{checkpoint['path']}, step {checkpoint['step']}" if checkpoint else "random weights"
    text = ", ".join(file["path"] for file in data["text"]) if "text" in data else None
    stderr = result["loss_stderr"]
    lines = [
        f"model         {result['model_name']} ({model})",
        f"text          {text or data['data_dir'] + ' ' + data['split']}: {result['n_tokens']:,} tokens "
        f"predicted, {result['n_bytes']:,} bytes",
        f"loss          {result['loss']:.4f}{'' if stderr is None else f' +- {stderr:.4f}'} nats per token",
        f"perplexity    {result['perplexity']:.4g}",
        f"bits per byte {result['bits_per_byte']:.4f}",
        f"speed         {result['tokens_per_s']:,.0f} tokens/s, {result['seconds']:.1f} s",
    ]
    if loads := result["expert_load"]:
        even = 1 / len(next(iter(loads.values())))
        lines += [f"expert load   share of a layer's tokens; even is {even:.1%}"]
        lines += ["  layer  max/mean  least used        most used"]
        lines += [load_row(layer, np.array(tokens)) for layer, tokens in loads.items()]
    return "\n".join(lines)


def load_row(layer: int, tokens_E: np.ndarray) -> str:
    """Return one layer's line of the expert load table."""
    share_E = tokens_E / tokens_E.sum()
    least, most = share_E.argmin(), share_E.argmax()
    ends = [f"{share_E[e]:6.1%} (expert {e})" for e in (least, most)]
    return f"  {layer:>5}  {share_E.max() * share_E.size:8.2f}  {ends[0]:<16}  {ends[1]}"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each default is written here and nowhere else."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt_dir", metavar="DIR", type=Path, help="checkpoint, or folder of final/, step-*/ (checkpoints)")
    add("--random_weights", action="store_true", help="score --model_config as before training")
    add("--model_config", metavar="FILE", type=Path, default=Path("model_config.yaml"), help="%(default)s")
    add("--tokenizer_dir", metavar="DIR", type=Path, help="for random weights (the one that made the data)")
    add("--data_dir", metavar="DIR", type=Path, default=Path("data/custom_text"), help="%(default)s")
    add("--split", choices=SPLITS, default="val", help="%(default)s")
    add("--text", metavar="FILE", type=Path, action="append", help="score this text instead; repeatable")
    add("--max_seq_length", metavar="T", type=int, help="tokens per window (the model's block_size)")
    add("--batch_size", metavar="N", type=int, default=8, help="windows at a time (%(default)s)")
    add("--max_batches", metavar="N", type=int, help="stop after N batches (score all)")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    add(
        "--precision",
        default="auto",
        help="auto (bf16-true on CUDA, else 32-true), 32-true, bf16-true, 16-true",
    )
    add("--seed", type=int, default=42, help="of the random weights (%(default)s)")
    add("--json", action="store_true", help="print JSON, with the load of every expert")
    default = "results.jsonl beside the checkpoint's folder"
    add("--results_file", metavar="FILE", help=f"append the JSON here, none = nowhere ({default})")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise a ValueError that tells every flag out of range."""
    values = {name: getattr(args, name) for name in ("max_seq_length", "batch_size", "max_batches")}
    wrong = {name: value for name, value in values.items() if value is not None and value < 1}
    bad = [f"--{name} is {value}; choose 1 or more" for name, value in wrong.items()]
    if args.random_weights and args.ckpt_dir:
        bad.append("--random_weights leaves no use for --ckpt_dir; give one of the two")
    if bad:
        raise ValueError("\n".join(bad))


def pick_tokenizer(args: argparse.Namespace, checkpoint: Path | None) -> Path:
    """Return the folder of the tokenizer: the checkpoint's own, or for random weights the data's."""
    if checkpoint or args.tokenizer_dir:
        folder = checkpoint or args.tokenizer_dir
    else:
        folder = Path("data/tokenizer") if args.text else find_tokenizer(args.data_dir, None)
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: holds no tokenizer.json; copy in the one used for training")
    return folder


def set_up(args: argparse.Namespace) -> "tuple[GPT, Corpus, dict]":
    """Return the model, the text and what is recorded about both, all checked against each other."""
    check_args(args)
    from moe_layers import load_model, pick_device

    device, dtype = pick_device(args.device, args.precision)
    folder = pick_checkpoint(args)
    if folder is None:
        print(RANDOM_WARNING, file=sys.stderr)
    tokenizer_dir = pick_tokenizer(args, folder)
    if args.text:
        corpus = text_corpus(args.text, tokenizer_dir)
    else:
        corpus = split_corpus(args.data_dir, args.split, tokenizer_dir)
    if folder:
        model = load_model(folder, device, dtype)
    else:
        model = random_model(args.model_config, args.seed, device, dtype)
    window = pick_window(args.max_seq_length, corpus, model)
    settings = {"max_seq_length": window, "batch_size": args.batch_size, "max_batches": args.max_batches}
    identity = {
        "checkpoint": describe_checkpoint(folder) if folder else None,
        "random_weights": folder is None,
        "model_name": model.config.name,
        "data": corpus.identity,
        "settings": {**settings, "device": str(device), "dtype": str(dtype).removeprefix("torch.")},
    }
    return model, corpus, identity


def pick_window(max_seq_length: int | None, corpus: Corpus, model: "GPT") -> int:
    """Return the inputs per window; ValueError where model and text, or model and flag, do not fit."""
    config = model.config
    if corpus.vocab_size > config.padded_vocab_size:
        raise ValueError(
            f"{corpus.tokenizer_dir}: the tokenizer has {corpus.vocab_size} pieces but {config.name} knows "
            f"{config.padded_vocab_size}; use the tokenizer that the model was made for"
        )
    window = max_seq_length or config.block_size
    if window > config.block_size:
        raise ValueError(f"--max_seq_length is {window}; choose at most {config.block_size}, the block_size")
    return window


def record(result: dict, args: argparse.Namespace) -> None:
    """Append the result as one line to the results file, and say so."""
    if args.results_file == "none":
        return
    checkpoint = result["checkpoint"]
    beside = Path(checkpoint["path"]).parent if checkpoint else CHECKPOINTS
    path = Path(args.results_file or beside / "results.jsonl")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise EvaluationError(f"{path}: not recorded ({reason}); name another --results_file") from error
    print(f"appended to {path}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad settings or input."""
    args = build_parser().parse_args(argv)
    try:
        hear_ctrl_c()
        model, corpus, identity = set_up(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from moe_layers import keep_freed_memory

    window = identity["settings"]["max_seq_length"]
    if identity["settings"]["device"] == "cpu":
        keep_freed_memory()  # chunk after chunk of logits
    try:
        figures = score(model, corpus, window, args.batch_size, args.max_batches)
        result = {**figures, **identity, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            print(json.dumps(result, indent=2) if args.json else report(result), flush=True)
        except BrokenPipeError:  # `| head`: the reader has seen enough; Python flushes once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        record(result, args)
    except (EvaluationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing is recorded; --max_batches N scores less", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(run_script(main))
