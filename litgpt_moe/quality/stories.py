"""Stories that a model writes from fixed beginnings, their figures, and the file for a reader.

Story number i has beginning i and the seed `seed` + i, so that generate.py can write any of them again alone.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from tqdm import tqdm

from litgpt_moe.checkpoints.reader import load_tokenizer, processor_of
from litgpt_moe.checkpoints.tokenizer_files import is_tokenizer
from litgpt_moe.cli import no_bar, note
from litgpt_moe.data.batches import TokenStream
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.data.tokenizer import as_value_error
from litgpt_moe.files import check_replaceable, write_whole
from litgpt_moe.generation.decode import Continuation, generate_together, make_decoder, room_for
from litgpt_moe.generation.settings import Sampling
from litgpt_moe.generation.text import encode_prompt
from litgpt_moe.quality.measures import measure, words_of

# Written for this project; half of them stop within a sentence, as in TinyStories' own test (Eldan and Li
# 2023, arxiv.org/abs/2305.07759, section 4)
BEGINNINGS = (
    "Once upon a time there was a little girl who wanted a",
    "Tom and his sister went down to the river. It had rained all night, and",
    "One day a small grey cat found a",
    "Mother said that nobody might open the red box. But",
    "It was the first day of snow. Anna looked out of the window and",
    "The old man had three sons. The youngest",
    "Ben had lost his hat. He looked under the bed, and there he saw",
    "A fox and a hen met on the road.",
    "In the garden behind the house there lived a",
    "The boy was afraid of the dark. So one evening his father",
    "Lily had a secret that she told to no one.",
    "The boat was very small, and the sea was",
    "There was once a king who could not sleep.",
    "On her birthday Mary got a present from her grandmother. She opened it and",
    "The dog barked and barked. At last Sam went to the door and",
    "Far away in the forest stood a little house.",
    "Jack did not want to share his cake. His friend was sad and said,",
    "When the sun came up, the bird was gone.",
    "The children built a house of wood and stones. Then",
    "A mouse lived in the wall of a big school.",
    "Every morning the baker gave one loaf to",
    "The two friends had quarrelled. Now they sat",
    "She ran as fast as she could, because",
    "Nobody knew where the music came from.",
)
TOGETHER = 16  # stories in a step; each has a KV cache
READ_TOKENS = 1 << 20  # of the training text at once
HEADING = "Stories written for evaluate.py --stories"  # first words of the file


@dataclass
class Story:
    """A beginning, and what the model made of it."""

    beginning: str
    text: str
    """What follows the beginning."""
    has_ended: bool
    """Whether the model ended it; otherwise the limit of tokens did."""
    seed: int


def write_stories(
    model: GPT, tokenizer_dir: Path, count: int, max_tokens: int, sampling: Sampling, seed: int
) -> tuple[list[Story], str]:
    """Return `count` stories of up to `max_tokens` new tokens, and the name of the engine."""
    decoder, tokenizer = make_decoder(model), load_tokenizer(tokenizer_dir)
    device, prompts, members = model.lm_head.weight.device, [], []
    for number in range(count):
        try:
            ids = encode_prompt(model, tokenizer, BEGINNINGS[number % len(BEGINNINGS)], max_tokens)
        except ValueError as error:
            raise ValueError(f"--stories: {str(error).replace('the prompt', 'a beginning')}") from None
        room = room_for(ids, max_tokens, model.max_seq_length)
        generator = torch.Generator(device).manual_seed(seed + number)
        prompts.append(ids)
        members.append(Continuation(ids, room, sampling, tokenizer.eos_id, generator))
    with (
        closing(generate_together(decoder, members, TOGETHER)) as texts,
        tqdm(texts, total=count, unit=" stories", disable=no_bar()) as progress,
    ):
        new_ids = [list(ids) for ids in progress]
    stories = []
    for number, (member, *ids) in enumerate(zip(members, prompts, new_ids, strict=True)):
        text, has_ended = _continuation(tokenizer, *ids), member.n_left > 0
        stories.append(Story(BEGINNINGS[number % len(BEGINNINGS)], text, has_ended, seed + number))
    return stories, decoder.name


def _continuation(tokenizer: Tokenizer, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Return the text of the new tokens, with the space before its first word."""
    before, whole = map(processor_of(tokenizer).decode, (prompt_ids, prompt_ids + new_ids))
    return whole.removeprefix(before)


def training_words(data_dir: Path, tokenizer_dir: Path) -> Iterator[list[str]] | None:
    """Return the words of each training text, decoded from the shards, or None, with a note, without any."""
    try:
        facts = read_manifest(data_dir)["tokenizer"]
        if not is_tokenizer((tokenizer_dir / "tokenizer.json").read_bytes(), facts["sha256"]):
            raise ValueError(f"{data_dir}: another tokenizer made it than the one in {tokenizer_dir}")
        stream = TokenStream(data_dir, "train")
    except (ValueError, OSError) as error:
        note(f"without the training text nothing is said about copies of it: {error}")
        return None
    return read_words(stream, load_tokenizer(tokenizer_dir), facts["eos_id"])


def read_words(
    stream: TokenStream, tokenizer: Tokenizer, eos_id: int, at_once: int = READ_TOKENS
) -> Iterator[list[str]]:
    """Yield the words of each text of a split, `at_once` tokens decoded at a time."""
    carry = np.empty(0, np.int64)
    with tqdm(total=len(stream), unit=" tokens", desc="training text", disable=no_bar()) as progress:
        for start in range(0, len(stream), at_once):
            new = stream.read(start, min(start + at_once, len(stream)))
            texts = np.split(ids := np.concatenate([carry, new]), np.flatnonzero(ids == eos_id) + 1)
            # the last text goes on in the next part, unless it is longer than any that prepare_data.py leaves
            is_last = start + at_once >= len(stream) or len(texts[-1]) > 4 * READ_TOKENS
            carry = np.empty(0, np.int64) if is_last else texts.pop()
            with as_value_error(Path("the tokenizer"), "it cannot decode the training text", "replace it"):
                decoded = processor_of(tokenizer).decode_batch([text.tolist() for text in texts])
            yield from map(words_of, decoded)
            progress.update(len(new))


def figures_of(stories: list[Story], training: Iterator[list[str]] | None) -> dict[str, Any]:
    """Return what can be said of the stories without a judge; `training` is read to its end."""
    ended = sum(story.has_ended for story in stories) / len(stories)
    texts = [words_of(story.text) for story in stories]
    return {"n": len(stories), "ended": ended, **measure(texts, training)}


def check_stories_file(path: Path) -> None:
    """Raise OSError if writing the stories to `path` would replace something else than such a file."""

    def is_own(path: Path) -> bool:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(len(HEADING)) == HEADING

    check_replaceable(path, is_own=is_own)


def save(stories: list[Story], figures: dict[str, Any], about: str, path: Path) -> None:
    """Write the stories to be read, each with its figures."""
    copied = figures.get("copied") or [None] * len(stories)
    parts = [f"{HEADING}\n{about}\n", *(line + "\n" for line in lines(figures))]
    for number, (story, n_words) in enumerate(zip(stories, copied, strict=True), start=1):
        facts = [f"seed {story.seed}", "ended by itself" if story.has_ended else "cut at the limit"]
        facts += [] if n_words is None else [f"longest run of words in the training text: {n_words}"]
        parts.append(f"\n{'-' * 20} {number}: {', '.join(facts)}\n{story.beginning} |{story.text.rstrip()}\n")
    write_whole(path, "".join(parts))


def lines(figures: dict[str, Any]) -> list[str]:
    """Return the figures as readable lines."""

    def share(name: str) -> str:
        return "-" if figures[name] is None else f"{figures[name]:.1%}"

    distinct = "-" if figures["distinct_3"] is None else f"{figures['distinct_3']:.3f}"
    size = f"{figures['n']} of {figures['words']:.0f} words on average"
    found = [f"stories       {size}, {share('ended')} ended by themselves"]
    found += [f"  diversity   distinct-3 {distinct}, repeated 4-grams {share('repeated_4')}"]
    if figures["copied_longest"] is not None:
        run = f"{figures['copied_longest']} words, {figures['copied_median']} in the median story"
        found += [f"  copied      longest run from the training text {run}"]
        found += [f"  vocabulary  {share('known_words')} of the words are in the training text"]
    return found
