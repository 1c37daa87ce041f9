"""Making a tokenizer: trained on the text of a data directory, or downloaded."""

import atexit
import contextlib
import itertools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from litgpt_moe.checkpoints.layout import CHECKPOINT_FILE, CONFIG_FILE, TOKENIZER_FILES
from litgpt_moe.cli import INTERRUPTED, no_bar, note
from litgpt_moe.data.download import download
from litgpt_moe.data.forms import Source
from litgpt_moe.data.parquet import reader_of
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.text import Reading
from litgpt_moe.data.tokenizer import (
    BYTE_PIECES,
    LLAMA_NORMALIZER,
    SPACE,
    TokenizerFacts,
    read_tokenizer_facts,
)
from litgpt_moe.files import read_json, write_json, write_whole
from litgpt_moe.locks import remove_left_over

TOKENIZER_REPO = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
OF_A_MODEL = (CHECKPOINT_FILE, CONFIG_FILE, "model.safetensors")
TRAINED_BY_US = "trained_vocab_size"  # key in tokenizer_config.json: the requested size
MAX_TRAINING_BYTES = 100 << 20  # of text; more hardly changes the merges
SAMPLED_FILES = 8  # of a data set on the hub
# The pre-tokenizer for training: no merge crosses a word, a digit, a run of punctuation or a newline. The
# length of each is bounded, because the time of training grows with the square of the longest one.
RUN = "{1,40}"
WORD = (
    rf"{SPACE}?\p{{L}}{RUN}(?:['\u2019]\p{{L}}{RUN})?|{SPACE}?\p{{N}}|{SPACE}?[^{SPACE}\s\p{{L}}\p{{N}}]{RUN}"
    rf"|{SPACE}|\n|[^\S\n]{RUN}"
)


def train_tokenizer(settings: PrepareSettings, vocab_size: int, text: list[Source]) -> None:
    """Train a Llama-style BPE on text files into tokenizer_dir; by byte fallback it encodes any text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = LLAMA_NORMALIZER
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    steps = (decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse())
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", *BYTE_PIECES],
        # a quarter of what the special and the byte pieces leave, but no more than that
        limit_alphabet=min(vocab_size - 259, max(64, (vocab_size - 259) // 4)),
        show_progress=False,
    )
    total = None if text[0].on_hub else sum(source.size for source in text)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizer", disable=no_bar()) as progress:
        stories = sampled_stories(settings, text, progress)
        call_interruptibly(lambda: tokenizer.train_from_iterator(stories, trainer))
    if (n_pieces := tokenizer.get_vocab_size()) < vocab_size:
        why = "no pair of pieces occurs twice in what is left of the text"
        note(f"the tokenizer has {n_pieces:,} pieces, not {vocab_size:,}: {why}; more text gives more")
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"] = None  # as in Llama's tokenizer, where only the merges decide
    # byte pieces are not special tokens: a text that spells "<0x41>" has these six characters
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 3]
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", TRAINED_BY_US: vocab_size}
    folder = settings.tokenizer_dir
    remove_left_over(*(folder / name for name in TOKENIZER_FILES))
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_whole(folder / "tokenizer.json", json.dumps(spec, ensure_ascii=False))


def sampled_stories(settings: PrepareSettings, text: list[Source], progress: "tqdm[Any]") -> Iterator[str]:
    """Yield as many stories as suffice to count pairs; the number bounds memory."""
    # problems of the text are reported when it is tokenized
    reading = Reading.of(settings, is_quiet=True)
    if not text[0].on_hub:
        every = 1 + sum(source.size for source in text) // MAX_TRAINING_BYTES
        lists = (reader_of(source, reading).story_lists(progress) for source in text)
        stories = (story for some in lists for more in some for story in more)
        yield from itertools.islice(stories, 0, None, every)
        return
    # what is read there is fetched: the beginnings of a few files that lie apart
    some = text[:: math.ceil(len(text) / SAMPLED_FILES)]
    for source in some:
        n_left = MAX_TRAINING_BYTES // len(some)
        for stories in reader_of(source, reading).story_lists(progress):
            yield from stories
            n_left -= sum(map(len, stories))
            if n_left <= 0:
                break


def call_interruptibly(function: Callable[[], object]) -> None:
    """Call a function that hears no Ctrl-C itself: in a daemon thread, which ends with the process."""
    errors: list[BaseException] = []
    ended = threading.Event()  # a thread whose join is interrupted counts as ended (python issue 89437)

    def call() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 (raised again below)
            errors.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=call, daemon=True).start()
        while not ended.wait(0.1):  # without a timeout Windows hears no Ctrl-C
            pass
    except BaseException:
        atexit.register(_end_before, ended)
        raise
    if errors:
        raise errors[0]


def _end_before(ended: threading.Event) -> None:
    """End the process at once if the thread is at work; called when Python is about to end.

    Python ends a thread that asks for its lock from then on, and the tokenizers library aborts the process.
    """
    if not ended.is_set():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(INTERRUPTED)


def ensure_tokenizer(settings: PrepareSettings, text: list[Source]) -> TokenizerFacts:
    """Return the facts of the tokenizer in tokenizer_dir, trained or downloaded unless it is there."""
    folder, wanted = settings.tokenizer_dir, settings.train_tokenizer
    is_there = (folder / "tokenizer.json").is_file()
    is_empty = not any((folder / name).exists() for name in TOKENIZER_FILES)
    # a killed training leaves our own configuration without a tokenizer.json
    is_free = is_empty or _trained_size(folder) is not None
    if wanted is not None and (settings.overwrite or (is_free and not is_there)):
        if any((folder / name).exists() for name in OF_A_MODEL):
            rule = "whose tokenizer is not replaced; name another folder with --tokenizer_dir"
            raise ValueError(f"{folder} holds a model, {rule}")
        note(f"training a tokenizer of {wanted:,} pieces into {folder}")
        train_tokenizer(settings, wanted, text)
    elif wanted is not None and _trained_size(folder) != wanted:
        raise ValueError(
            f"{folder}: there is another tokenizer; --overwrite replaces it, --tokenizer_dir names another "
            "folder, and without --train_tokenizer it is used"
        )
    elif not is_there:
        note(f"{folder}: no tokenizer there")
        train = "train one on the text with prepare_data.py --train_tokenizer 4096"
        way_out = f"name a folder that has tokenizer.json with --tokenizer_dir, or {train}"
        for name in reversed(TOKENIZER_FILES):  # tokenizer.json last: a folder that has it counts as complete
            download(TOKENIZER_REPO, "model", name, folder, way_out)
    return read_tokenizer_facts(folder)


def _trained_size(folder: Path) -> int | None:
    return read_json(folder / "tokenizer_config.json").get(TRAINED_BY_US)
