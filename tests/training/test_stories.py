"""The stories that a run writes: once a step, from a prompt, and without a trace in the training."""

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.loss import defer_head
from litgpt_moe.training.csv_log import CsvLog
from litgpt_moe.training.settings import EvalArgs, Settings
from litgpt_moe.training.stories import PROMPT, StoryLog, final_story

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def story_log(tmp_path: Path, tiny_checkpoint: Path) -> StoryLog:
    settings = Settings(tokenizer_dir=tiny_checkpoint, eval=EvalArgs(max_new_tokens=5))
    run = SimpleNamespace(settings=settings, tokens_at=lambda step: step * 256)
    return StoryLog(CsvLog(tmp_path / "stories.csv", ["step", "tokens", "prompt", "text"]), run)


def rows(log: StoryLog) -> list[dict[str, str]]:
    with log.log.path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_step_has_one_story(story_log: StoryLog, tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    for step in (4, 4, 8):
        story_log.tell(model, None, step)
    assert [(row["step"], row["tokens"], row["prompt"]) for row in rows(story_log)] == [
        ("4", "1024", PROMPT),
        ("8", "2048", PROMPT),
    ]
    assert all(row["text"].startswith(PROMPT) for row in rows(story_log))


def test_a_story_leaves_the_model_and_the_random_numbers_of_training_as_they_were(
    story_log: StoryLog, tiny_checkpoint: Path
) -> None:
    model = load_model(tiny_checkpoint).train()
    head = defer_head(model)
    assert head is not None
    state = torch.get_rng_state()
    story_log.tell(model, head, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert head.is_deferred and model.training
    assert rows(story_log)[0]["text"].startswith(PROMPT)
    assert not any(hasattr(block.attn, "kv_cache") and block.attn.kv_cache for block in model.transformer.h)


def test_no_story_where_none_is_wanted_or_another_process_writes_it(
    story_log: StoryLog, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_checkpoint)
    with monkeypatch.context() as patched:
        patched.setenv("LOCAL_RANK", "1")
        story_log.tell(model, None, 4)
    story_log.max_new_tokens = None
    story_log.tell(model, None, 4)
    assert not story_log.log.path.exists() and story_log.last_step == -1


def test_the_last_story_is_told_from_the_checkpoint_alone(tmp_path: Path, storyteller: Path) -> None:
    moved = shutil.copytree(storyteller, tmp_path / "final")
    assert final_story(moved) == final_story(storyteller) != ""


def test_a_model_without_finite_logits_tells_no_story(story_log: StoryLog, tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)  # finite themselves
    story_log.tell(model, None, 4)
    assert rows(story_log)[0]["text"] == "(none: the model's logits are not finite)"
