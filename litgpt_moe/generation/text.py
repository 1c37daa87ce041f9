"""From a prompt to tokens, and from tokens to text that is written while the model computes the next ones."""

import copy
import itertools
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import tokenizers
import torch
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

from litgpt_moe.checkpoints.layout import find_checkpoint
from litgpt_moe.checkpoints.reader import load_model, load_tokenizer, processor_of
from litgpt_moe.cli import WorkFailed, is_closed_pipe, note, printable, say, silence_stdout, status
from litgpt_moe.data.tokenizer import BYTE_PIECES, as_value_error, check_normalizer
from litgpt_moe.files import read_json
from litgpt_moe.generation.decode import (
    Continuation,
    Diverged,
    generate,
    generate_together,
    lay_out_for_decoding,
    make_decoder,
    room_for,
)
from litgpt_moe.generation.decoder import Decoder, TorchDecoder
from litgpt_moe.generation.settings import MAX_CHOICES, GenerateSettings, Sampling
from litgpt_moe.hardware import pick_device
from litgpt_moe.terminal import WordWrapper, columns

DECODES = (Path("the tokenizer"), "it cannot decode what the model wrote", "use another tokenizer")
REPLACEMENT = "\ufffd"  # decoders write it for bytes that are not, or not yet, a whole character


def load(settings: GenerateSettings) -> tuple[GPT, Tokenizer, Decoder]:
    """Return the checkpoint's model, its tokenizer, and the decoder for the model."""
    device, dtype = pick_device(settings.device, settings.precision)
    folder = find_checkpoint(settings.ckpt_dir)
    model = load_model(folder, device, dtype)  # first: it finds what is damaged
    tokenizer, path = load_tokenizer(folder), folder / "tokenizer.json"
    check_normalizer(read_json(path), path)
    decoder = make_decoder(model, settings.engine, settings.quantize == "int8")
    if isinstance(decoder, TorchDecoder) and device.type == "cpu":
        lay_out_for_decoding(model)
    kind = settings.quantize if settings.quantize != "none" else str(dtype).removeprefix("torch.")
    note(f"checkpoint {folder} on {device} in {kind}, engine {decoder.name}")
    return model, tokenizer, decoder


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text as LitGPT's `Tokenizer.encode` does; ValueError if the library fails."""
    # encode_batch releases the GIL, which encode holds: the server tokenizes in a thread
    releasing, encode_batch = copy.copy(tokenizer), processor_of(tokenizer).encode_batch
    releasing.processor = SimpleNamespace(encode=lambda text: encode_batch([text])[0])  # pyright: ignore
    with as_value_error(
        Path("the tokenizer"), "it fails on the prompt", "change the prompt or the tokenizer"
    ):
        return releasing.encode(text).tolist()


def encode_prompt(model: GPT, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> list[int]:
    """Return the prompt's token ids; ValueError if it has none, leaves no room, or the tokenizer is wrong."""
    prompt_ids = encode(tokenizer, prompt)
    room_for(prompt_ids, max_tokens, model.max_seq_length)
    check_prompt(model, prompt_ids)
    return prompt_ids


def check_prompt(model: GPT, prompt_ids: list[int]) -> None:
    """Raise ValueError for a prompt longer than the attention's sliding window, or with unknown tokens."""
    config = model.config
    window, is_used = config.sliding_window_size, any((config.sliding_window_indices or [])[: config.n_layer])
    if window is not None and is_used and len(prompt_ids) > window:
        sizes = f"{len(prompt_ids):,} tokens but the model's sliding_window_size is {window:,}"
        raise ValueError(f"the prompt has {sizes}; shorten it: LitGPT reads a prompt of one window at most")
    if max(prompt_ids, default=0) >= model.lm_head.out_features:
        size = f"token {max(prompt_ids):,}, the model knows {model.lm_head.out_features:,}"
        raise ValueError(f"the tokenizer is not the model's ({size}); copy the right one into the checkpoint")


def tell_story(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling, seed: int
) -> str:
    """Return the prompt and its continuation, or a note in brackets where the model has diverged.

    The model is left in eval mode and without a cache; torch's global random numbers are not used.
    """
    model.eval()
    try:
        prompt_ids = encode(tokenizer, prompt)
        check_prompt(model, prompt_ids)
    except ValueError as error:
        return f"(none: {error})"
    if len(prompt_ids) >= model.max_seq_length:
        return prompt  # the prompt alone fills the context of a toy model
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    new_ids = generate(make_decoder(model), prompt_ids, max_new_tokens, sampling, tokenizer.eos_id, generator)
    try:
        ids = torch.tensor([*prompt_ids, *new_ids])
    except Diverged:
        return "(none: the model's logits are not finite)"
    try:
        with as_value_error(*DECODES):
            return tokenizer.decode(ids).strip()
    except ValueError as error:
        return f"(none: {error})"


class TextDecoder:
    """Decode one token at a time; the returned pieces, joined, are the tokenizer's decoding of all tokens.

    `tokenizers.decoders.DecodeStream` is not used: as of tokenizers 0.23 it raises "Invalid prefix" when
    bytes that follow a finished emoji are invalid (the whole run of byte pieces is then shown as U+FFFD),
    and it never returns an unfinished character. The work per token is constant: a short window is decoded.
    """

    CONTEXT = 4  # tokens kept before the new ones: a character has at most four bytes
    LONGEST = 16  # a longer window is cut although it ends in U+FFFD, which is then part of the text

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that have been returned already

    def put(self, token_id: int) -> str:
        """Return the text that this token completes, which may be empty."""
        piece = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        # special and unknown ids have no text and must not be the first token, whose space is stripped
        if piece is None:
            return ""
        self._window.append(token_id)
        if piece in BYTE_PIECES:
            return ""  # one invalid byte changes the text of the whole run of bytes: wait for its end
        text = self._decode()
        stable = text.removesuffix(REPLACEMENT)
        new, self._shown = stable[self._shown :], len(stable)
        if stable == text or len(self._window) > self.LONGEST:
            self._window = self._window[-self.CONTEXT :]
            self._shown = len(self._decode().removesuffix(REPLACEMENT))
        return new

    def end(self) -> str:
        """Return the text that is still held back; an incomplete character becomes U+FFFD."""
        return self._decode()[self._shown :]

    def _decode(self) -> str:
        with as_value_error(*DECODES):
            return self._tokenizer.decode(self._window)


class AsyncTokenStreamer(AbstractContextManager):
    """Write tokens as text in a background thread, so that the model never waits for the terminal.

    It is a context manager, which flushes the queue at its end, after Ctrl-C too. An error of the thread (a
    closed pipe, a full disk) is raised by the next `put` or `end`.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, out: TextIO | None = None) -> None:
        self._decoder, self._out = TextDecoder(tokenizer), out or sys.stdout
        # a terminal obeys what a model may write, and breaks its lines in the middle of words
        self._is_terminal, self._wrapper = self._out.isatty(), WordWrapper(columns())
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="token-streamer", daemon=True)
        self._thread.start()

    def put(self, token_id: int) -> None:
        """Queue one token."""
        if self._error is not None:
            raise self._error
        self._queue.put(token_id)

    def end(self) -> None:
        """Flush: write all queued tokens and wait for the thread to end; further calls are no-ops."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def __exit__(self, kind: object, *_: Any) -> None:
        # an error inside the block is reported rather than one of the writing thread
        with suppress(OSError) if kind else nullcontext():
            self.end()

    def _run(self) -> None:
        try:
            while (token_id := self._queue.get()) is not None:
                self._write(self._decoder.put(token_id))
            self._write(self._decoder.end())
            if self._is_terminal:
                print(self._wrapper.end(), end="", file=self._out, flush=True)
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread, whatever it is
            self._error = error

    def _write(self, text: str) -> None:
        if self._is_terminal:
            text = self._wrapper.put(printable(text))
        print(text, end="", file=self._out, flush=True)


def write_samples(settings: GenerateSettings, sampling: Sampling, prompt: str) -> None:
    """Write --num_samples texts one after the other; they are generated together, with consecutive seeds."""
    with status("loading the model"):
        model, tokenizer, decoder = load(settings)
    prompt_ids = encode_prompt(model, tokenizer, prompt, settings.max_tokens)
    n_new = room_for(prompt_ids, settings.max_tokens, model.max_seq_length)
    device, count = model.lm_head.weight.device, settings.num_samples
    seed = torch.Generator().seed() % 2**32 if settings.seed is None else settings.seed

    def member(number: int) -> Continuation:
        # a seed for each, so that --seed repeats any of them alone
        generator = torch.Generator(device).manual_seed(seed + number)
        return Continuation(prompt_ids, n_new, sampling, tokenizer.eos_id, generator)

    with Speed() as speed:
        for first in range(0, count, MAX_CHOICES):
            members = [member(number) for number in range(first, min(first + MAX_CHOICES, count))]
            with closing(generate_together(decoder, members)) as texts:
                for number, new_ids in enumerate(texts, first):
                    if number:
                        say("<|endoftext|>")
                    if sampling.temperature > 0:
                        note(f"seed {seed + number}")
                    write_sample(
                        AsyncTokenStreamer(processor_of(tokenizer)), prompt_ids, speed.count(new_ids)
                    )
                    if n_new < settings.max_tokens and members[number - first].n_left == 0:
                        note(f"stopped: the context of {model.max_seq_length:,} tokens is full")


def write_sample(streamer: AsyncTokenStreamer, prompt_ids: list[int], new_ids: Iterator[int]) -> None:
    """Write prompt and continuation token by token."""
    try:
        with streamer:
            for token_id in itertools.chain(prompt_ids, new_ids):
                streamer.put(token_id)
        print(flush=True)
    except OSError as error:
        silence_stdout()
        if is_closed_pipe(error):  # `| head` closes it when it has seen enough
            raise BrokenPipeError from None
        reason = f"standard output could not be written ({error.strerror or error})"
        raise WorkFailed(f"{reason}; make room, or send it elsewhere") from None


class Speed(AbstractContextManager):
    """Writes to stderr, at the end of its block and after Ctrl-C too, how many tokens came, and how fast."""

    def __init__(self) -> None:
        self._started, self._first_s, self._count = time.perf_counter(), 0.0, 0

    def count(self, ids: Iterator[int]) -> Iterator[int]:
        """Yield the tokens and count them."""
        for token_id in ids:
            self._count += 1
            self._first_s = self._first_s or time.perf_counter() - self._started
            yield token_id

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._started
        rate = f"{self._count / seconds:.1f} tokens/s, the first after {self._first_s:.2f} s"
        note(f"{self._count} new tokens in {seconds:.1f} s, {rate}")
