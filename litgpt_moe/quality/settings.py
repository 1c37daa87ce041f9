"""The flags of evaluate.py for what is scored beside the loss. Nothing heavy is imported here."""

import re
from dataclasses import dataclass
from pathlib import Path

from litgpt_moe.generation.settings import check_ranges

HUB = Path("hub")
MAX_STORIES = 1_000  # the runs that they share with the training text are found in memory
URL = re.compile(r"https?://[^\s/?#]+[^\s?#]*")


@dataclass(frozen=True)
class QualitySettings:
    """What is scored beside the loss, all of it off unless asked for."""

    blimp: Path | None = None
    """Score minimal pairs of sentences: BLiMP's zip, a folder of its .jsonl, hub = download to data/blimp."""
    stories: int | None = None
    """Let the model write this many stories and score them."""
    story_tokens: int = 400
    """New tokens of a story at most."""
    stories_file: Path = Path("stories.txt")
    """Write the stories here to be read, none = nowhere."""
    judge: str | None = None
    """Have the stories graded by the model behind this address, as http://127.0.0.1:8080/v1."""
    judge_model: str | None = None
    """Name of the judge's model (default: the only one that the server lists)."""
    judge_timeout: float = 120.0
    """Seconds to wait for a grade."""

    def __post_init__(self) -> None:
        rules = [
            ("stories", self.stories is None or 1 <= self.stories <= MAX_STORIES, f"1 to {MAX_STORIES:,}"),
            ("story_tokens", self.story_tokens >= 1, "1 or more"),
            ("judge_timeout", 0 < self.judge_timeout <= 86_400, "above 0, in seconds"),
        ]
        check_ranges(self, rules)
        if self.judge is not None and not URL.fullmatch(self.judge):
            raise ValueError(f"--judge is {self.judge!r}; give an address such as http://127.0.0.1:8080/v1")
        if self.judge is not None and self.stories is None:
            raise ValueError("judge grades stories; add --stories 20")
