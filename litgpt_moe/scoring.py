"""Score a model on text: loss, perplexity and bits per byte.

The tokens, in order, are cut into windows of T inputs (T = block_size), the last one shorter. Every token but
the very first is predicted exactly once, from the tokens before it in its window. The loss is the mean over
these predictions, BOS and EOS included, in nats per token. Its standard error comes from the spread of the
windows' means, weighted by length. Bits per byte is the sum of all nats, in bits, over the bytes of the text.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from litgpt.model import GPT, do_softcapping
from litgpt.pretrain import initialize_weights
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from litgpt_moe.balance import count_expert_load, expert_load
from litgpt_moe.checkpoints.layout import CHECKPOINT_FILE, find_checkpoint
from litgpt_moe.checkpoints.reader import read_settings, read_state, trained_on, verify_checkpoint
from litgpt_moe.checkpoints.state_file import sha256_of
from litgpt_moe.checkpoints.tokenizer_files import is_tokenizer
from litgpt_moe.cli import WorkFailed, command_line, is_out_of_memory, no_bar, note
from litgpt_moe.config import MoEConfig
from litgpt_moe.data.batches import TokenStream
from litgpt_moe.data.forms import Source, form_of
from litgpt_moe.data.freshness import stale_reasons
from litgpt_moe.data.manifest import MANIFEST, manifest_fingerprint, read_manifest
from litgpt_moe.data.parquet import reader_of
from litgpt_moe.data.settings import DEFAULT_DATA_DIR, DEFAULT_TOKENIZER_DIR
from litgpt_moe.data.text import Reading, check_text_file
from litgpt_moe.data.tokenizer import StoryEncoder, as_value_error, load_for_encoding, read_tokenizer_facts
from litgpt_moe.data.tokenizer_folder import find_tokenizer
from litgpt_moe.loss import chunk_rows

FIGURES = ("loss", "loss_stderr", "perplexity", "bits_per_byte", "total_nats")
COUNTS = ("n_tokens", "n_bytes", "n_windows", "tokens_per_s", "seconds")
# the result where no text is scored
NO_FIGURES = {**dict.fromkeys((*FIGURES, *COUNTS)), "expert_load": {}}


@dataclass
class Corpus:
    """A stream of token ids to score."""

    read: Callable[[int, int], np.ndarray]
    """Return the token ids from start to stop, int64."""
    n_tokens: int
    n_bytes: int
    """UTF-8 bytes of the whole text."""
    vocab_size: int
    tokenizer_dir: Path
    identity: dict[str, Any]
    """Names and digests of the text, recorded with the result."""


def split_corpus(data_dir: Path, split: str, tokenizer_dir: Path) -> Corpus:
    """Return a prepared split; ValueError if another tokenizer or an older text made it."""
    manifest = read_manifest(data_dir)
    facts = manifest["tokenizer"]
    if not is_tokenizer((tokenizer_dir / "tokenizer.json").read_bytes(), facts["sha256"]):
        command = command_line("prepare_data.py", "--tokenizer_dir", tokenizer_dir)
        way_out = f"run {command}, or score text files with --text"
        other = f"tokenized with another tokenizer than the one in {tokenizer_dir}"
        raise ValueError(f"{data_dir}: {other}; {way_out}")
    if reasons := stale_reasons(data_dir, tokenizer_dir):
        raise ValueError(f"{data_dir}: {reasons[0]}; run prepare_data.py on that folder again")
    stream = TokenStream(data_dir, split)
    if len(stream) < 2:
        raise ValueError(f"{data_dir}: the {split} split has {len(stream)} tokens; scoring needs 2 or more")
    n_bytes = manifest["splits"][split]["n_bytes"]
    identity = {"data_dir": str(data_dir), "split": split, "fingerprint": manifest_fingerprint(manifest)}
    return Corpus(stream.read, len(stream), n_bytes, facts["vocab_size"], tokenizer_dir, identity)


def text_corpus(paths: list[Path], tokenizer_dir: Path, text_column: str | None = None) -> Corpus:
    """Return the concatenated stories of text files, each BOS ... EOS as in the shards.

    They are read in each form that prepare_data.py knows by a name, and as plain text under other names.
    """
    encoder = StoryEncoder(read_tokenizer_facts(tokenizer_dir))
    ids, n_bytes, reading = [], 0, Reading(text_column=text_column)
    records = []
    for path in paths:
        check_text_file(path)
        form, packing = form_of(path) or (".txt", "")
        reader = reader_of(Source(path, form, packing, str(path)), reading)
        before = len(ids)
        for stories in reader.story_lists(tqdm(disable=True)):
            ids += map(encoder.encode, stories)
            n_bytes += sum(len(story.encode()) for story in stories)
        if len(ids) == before:
            raise ValueError(f"{path}: holds no text; name a UTF-8 text file with at least one word")
        record = reader.record()
        records.append({"path": record["path"], "sha256": record["sha256"]})
        if reader.column is not None:  # an earlier version scored a file of rows as it stands
            records[-1]["column"] = reader.column
            note(f"{path}: each row is a story, its text is in the column {reader.column!r}")
    stream = np.concatenate(ids)
    vocab_size, identity = encoder.facts.vocab_size, {"text": records}
    return Corpus(lambda a, b: stream[a:b], len(stream), n_bytes, vocab_size, tokenizer_dir, identity)


def pick_tokenizer(folder: Path | None, data_dir: Path | None) -> Path:
    """Return the folder of the tokenizer: `folder`, else the one that made the data, else the default one."""
    if folder is None:
        folder = DEFAULT_TOKENIZER_DIR if data_dir is None else find_tokenizer(data_dir, None)
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: holds no tokenizer.json; copy in the one used for training")
    return folder


def bytes_of_first(corpus: Corpus, n_tokens: int) -> int:
    """Return the UTF-8 bytes of the text that the first `n_tokens` stand for."""
    if n_tokens >= corpus.n_tokens:
        return corpus.n_bytes
    path = corpus.tokenizer_dir / "tokenizer.json"
    tokenizer = load_for_encoding(path.read_bytes(), path)
    ids = corpus.read(0, n_tokens)
    # each story is decoded alone, because the decoder drops the space before the first word of a text
    stories = np.split(ids, np.flatnonzero(ids == read_tokenizer_facts(corpus.tokenizer_dir).bos_id))
    with as_value_error(path, "it cannot decode the text", "use another tokenizer"):
        *whole, last = tokenizer.decode_batch([story.tolist() for story in stories])
    kept = last.rstrip("\ufffd")  # a character cut at the end decodes to one U+FFFD for each of its bytes
    return sum(len(text.encode()) for text in (*whole, kept)) + len(last) - len(kept)


def random_model(config_path: Path, seed: int, device: torch.device, dtype: torch.dtype) -> GPT:
    """Return the model as LitGPT initialises it before the first training step."""
    config = MoEConfig.from_file(config_path)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(config)
        # litgpt 0.5.13 reads only whether the Fabric's strategy is FSDP
        fabric: Any = SimpleNamespace(strategy=None)
        initialize_weights(fabric, model, config.n_layer, config.n_embd)
    return model.requires_grad_(False).to(device, dtype).eval()


def pick_checkpoint(named: Path | None, default: Path) -> Path | None:
    """Return the verified checkpoint in `named`, else the one in `default`, None if that has none."""
    try:
        folder = find_checkpoint(named or default)
    except FileNotFoundError:
        if named:
            raise
        return None
    verify_checkpoint(folder)
    return folder


def data_of(folder: Path | None) -> Path:
    """Return the prepared data that the checkpoint in `folder` was trained on, if they are here."""
    place = trained_on(read_settings(folder)) if folder else None
    return place if place and (place / MANIFEST).is_file() else DEFAULT_DATA_DIR


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's absolute path, its step (None if unknown) and the SHA-256 of its weights."""
    path = folder / CHECKPOINT_FILE
    step = read_state(path).get("step_count")
    step = step if isinstance(step, int) else None
    return {"path": str(folder.absolute()), "step": step, "sha256": sha256_of(path)}


def check_vocabulary(size: int, tokenizer_dir: Path, model: GPT) -> None:
    """Raise ValueError if a tokenizer of `size` pieces has some that the model does not know."""
    if size > model.lm_head.out_features:
        sizes = f"{size} pieces but {model.config.name} knows {model.lm_head.out_features}"
        way_out = "use the tokenizer that the model was made for"
        raise ValueError(f"{tokenizer_dir}: the tokenizer has {sizes}; {way_out}")


def pick_window(max_seq_length: int | None, corpus: Corpus, model: GPT) -> int:
    """Return the inputs per window. ValueError if tokenizer or --max_seq_length do not fit the model."""
    check_vocabulary(corpus.vocab_size, corpus.tokenizer_dir, model)
    window = max_seq_length or model.config.block_size
    if window > model.config.block_size:
        most = f"choose at most {model.config.block_size}, the block_size"
        raise ValueError(f"--max_seq_length is {window}; {most}")
    return window


def iter_batches(corpus: Corpus, window: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yield (B, window + 1) ids; a row's last is the next row's first. A shorter last window comes alone."""
    n_whole = (corpus.n_tokens - 1) // window
    for first in range(0, n_whole, batch_size):
        last = min(first + batch_size, n_whole)
        ids = corpus.read(first * window, last * window + 1)
        yield np.lib.stride_tricks.sliding_window_view(ids, window + 1)[::window]
    if n_whole * window < corpus.n_tokens - 1:
        yield corpus.read(n_whole * window, corpus.n_tokens)[None]


@contextmanager
def head_apart(model: GPT) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """In the block `model` returns hidden states; yield the function from these to float32 logits."""
    head, cap = model.lm_head, model.config.final_logit_softcapping

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        raw = head(hidden).float()
        return raw if cap is None else do_softcapping(raw, cap)

    try:
        setattr(model, "lm_head", torch.nn.Identity())  # noqa: B010  LitGPT declares it as a Linear
        model.config.final_logit_softcapping = None
        yield logits
    finally:
        model.lm_head, model.config.final_logit_softcapping = head, cap


@contextmanager
def memory_for(batch_size: int) -> Iterator[None]:
    """In the block, turn a lack of memory into a sentence about --batch_size."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise WorkFailed(f"no memory for --batch_size {batch_size}; choose less") from None
        raise


def window_nats(model: GPT, logits: Callable, ids: torch.Tensor, rows: int) -> list[float]:
    """Return the summed cross-entropy of each row of `ids` (B, T+1), with `rows` tokens' logits at a time."""
    hidden, targets = model(ids[:, :-1]), ids[:, 1:]
    parts = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    nats = torch.cat([cross_entropy(logits(x), y, reduction="none") for x, y in parts])
    # float64: the rounding errors of ten million float32 additions would be visible
    return nats.view(targets.shape).cpu().double().sum(dim=1).tolist()


def score(
    model: GPT, corpus: Corpus, window: int, batch_size: int = 8, max_batches: int | None = None
) -> dict[str, Any]:
    """Return the figures of `summarize`, the speed and the experts' load."""
    vocab, device = model.lm_head.out_features, model.lm_head.weight.device
    rows = chunk_rows(device, vocab)  # all logits would take gigabytes
    count_expert_load(model, True)
    nats, lengths, start = [], [], time.perf_counter()
    batches = islice(iter_batches(corpus, window, batch_size), max_batches and min(max_batches, sys.maxsize))
    with (
        torch.inference_mode(),
        head_apart(model) as logits,
        tqdm(total=corpus.n_tokens - 1, unit=" tokens", disable=no_bar()) as progress,
    ):
        for batch in batches:
            if batch.max() >= vocab:
                raise WorkFailed(f"the data hold token {batch.max()} but the model knows {vocab}")
            with memory_for(batch_size):
                nats += window_nats(model, logits, torch.from_numpy(batch.copy()).to(device), rows)
            lengths += [batch.shape[1] - 1] * batch.shape[0]
            progress.update(batch.size - batch.shape[0])
    seconds = time.perf_counter() - start
    load = {layer: tokens.long().tolist() for layer, tokens in expert_load(model).items()}
    count_expert_load(model, False)
    figures = summarize(np.array(nats), np.array(lengths), bytes_of_first(corpus, sum(lengths) + 1))
    return {**figures, "tokens_per_s": figures["n_tokens"] / seconds, "seconds": seconds, "expert_load": load}


def summarize(nats: np.ndarray, lengths: np.ndarray, n_bytes: int) -> dict[str, Any]:
    """Return loss, standard error, perplexity and bits per byte from the windows' nats and lengths."""
    total, n_tokens, n_windows = float(nats.sum()), int(lengths.sum()), len(nats)
    loss = total / n_tokens
    if not math.isfinite(loss):
        raise WorkFailed(f"the loss is {loss}: damaged weights, or --precision too narrow; try 32-true")
    stderr = None  # unknown for one window
    if n_windows > 1:  # standard error of a ratio of two sums: Cochran, Sampling Techniques, eq. 2.39
        deviations = nats - loss * lengths
        stderr = math.sqrt((deviations**2).sum() * n_windows / (n_windows - 1)) / n_tokens
    return {
        "loss": loss,
        "loss_stderr": stderr,
        "perplexity": math.exp(min(loss, 700.0)),  # exp overflows at 709
        "bits_per_byte": total / math.log(2) / n_bytes,
        "total_nats": total,
        **{"n_tokens": n_tokens, "n_bytes": n_bytes, "n_windows": n_windows},
    }
