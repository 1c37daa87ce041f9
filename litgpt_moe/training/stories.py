"""The stories that a model writes at each validation and at the end of its training."""

import functools
from pathlib import Path

from litgpt import GPT, Tokenizer

from litgpt_moe.checkpoints.reader import load_model, load_tokenizer
from litgpt_moe.generation.settings import Sampling
from litgpt_moe.generation.text import tell_story
from litgpt_moe.loss import LossHead
from litgpt_moe.processes import is_main_process
from litgpt_moe.training.csv_log import CsvLog
from litgpt_moe.training.run import Run

PROMPT = "Once upon a time"
# fixed, so that the stories of a run differ only by what the model has learned
SEED = 1
FINAL_NEW_TOKENS = 300
SAMPLING = Sampling(temperature=0.7, top_k=0, top_p=0.9)


class StoryLog:
    """Writes a continuation of PROMPT by the model in training to logs/stories.csv, one per step at most."""

    def __init__(self, log: CsvLog, run: Run) -> None:
        self.run, self.log, self.tokenizer_dir = run, log, run.settings.tokenizer_dir
        self.max_new_tokens = run.settings.eval.max_new_tokens
        # -1 before the first story
        self.last_step = -1

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, loaded at first use: it exists once rank 0 has prepared the data."""
        return load_tokenizer(self.tokenizer_dir)

    def tell(self, model: GPT, head: LossHead | None, step: int) -> None:
        """Write a story, without a change to the model or to training's random generators."""
        # the final validation may come right after the one of the last step
        if not self.max_new_tokens or self.last_step == step or not is_main_process():
            return
        self.last_step = step
        if head is not None:
            head.is_deferred = False
        text = tell_story(model, self.tokenizer, PROMPT, self.max_new_tokens, SAMPLING, SEED)
        if head is not None:
            head.is_deferred = True
        model.train()
        row = {"step": step, "tokens": self.run.tokens_at(step), "prompt": PROMPT, "text": text}
        self.log.write(row)


def final_story(checkpoint_dir: Path) -> str:
    """Return a story by the model in a checkpoint."""
    model, tokenizer = load_model(checkpoint_dir), load_tokenizer(checkpoint_dir)
    return tell_story(model, tokenizer, PROMPT, FINAL_NEW_TOKENS, SAMPLING, SEED)
