"""All that evaluate.py is asked to score beside the loss."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from litgpt.model import GPT

from litgpt_moe.cli import WorkFailed, note
from litgpt_moe.generation.settings import Sampling
from litgpt_moe.quality import blimp, judge, stories
from litgpt_moe.quality.pairs import Paradigm, read_paradigms
from litgpt_moe.quality.settings import QualitySettings

SAMPLING = Sampling()  # as generate.py draws without flags


@dataclass(frozen=True)
class Inputs:
    """What is read, or asked for, before anything is scored: scoring may take long."""

    paradigms: list[Paradigm]
    files: dict[str, Any]
    """What identifies the files of the minimal pairs."""
    judge: judge.Judge | None


def read_inputs(settings: QualitySettings) -> Inputs:
    """Return the inputs; ValueError, OSError or WorkFailed if one, or the file of stories, cannot be used."""
    if settings.stories and settings.stories_file != Path("none"):
        stories.check_stories_file(settings.stories_file)
    paradigms, files = read_paradigms(settings.blimp) if settings.blimp else ([], {})
    grader = None
    if settings.judge:
        grader = judge.Judge(settings.judge, settings.judge_model, settings.judge_timeout)
    return Inputs(paradigms, files, grader)


@dataclass(frozen=True)
class Subject:
    """The model that is assessed, and what belongs to it."""

    model: GPT
    identity: dict[str, Any]
    """Facts about it that evaluate.py records: `model_name`, `checkpoint`, `settings`."""
    tokenizer_dir: Path
    data_dir: Path | None
    """Prepared data, whose training text is searched for what the stories share with it."""
    seed: int
    """Of the first story."""


def assess(
    subject: Subject, settings: QualitySettings, inputs: Inputs, figures_of_loss: dict[str, Any]
) -> dict[str, Any]:
    """Return what was asked for: `blimp`, `stories`; an error as `failure` if there are other figures."""
    found: dict[str, Any] = {}
    try:
        if inputs.paradigms:
            batch_size = subject.identity["settings"]["batch_size"]
            figures = blimp.score_pairs(subject.model, subject.tokenizer_dir, inputs.paradigms, batch_size)
            found["blimp"] = figures | {"data": inputs.files}
        if settings.stories:
            found["stories"] = _assess_stories(subject, settings, settings.stories, inputs.judge)
    except (ValueError, WorkFailed) as error:
        if figures_of_loss["loss"] is None and not found:
            raise
        found["failure"] = str(error)
    return found


def _assess_stories(
    subject: Subject, settings: QualitySettings, count: int, grader: judge.Judge | None
) -> dict[str, Any]:
    tokenizer_dir, data_dir, seed = subject.tokenizer_dir, subject.data_dir, subject.seed
    options = (count, settings.story_tokens, SAMPLING, seed)
    told, engine = stories.write_stories(subject.model, tokenizer_dir, *options)
    training = stories.training_words(data_dir, tokenizer_dir) if data_dir else None
    figures = stories.figures_of(told, training)
    facts: dict[str, Any] = {"max_tokens": settings.story_tokens, "seed": seed, "engine": engine}
    facts |= {"sampling": asdict(SAMPLING), "training_text": str(data_dir) if training else None}
    if settings.stories_file != Path("none"):
        identity = subject.identity
        checkpoint = identity["checkpoint"] or {"path": "random weights", "step": None}
        about = f"{identity['model_name']} ({checkpoint['path']}, step {checkpoint['step']})"
        stories.save(told, figures, about, settings.stories_file)
        note(f"wrote the stories to {settings.stories_file}")
        facts["file"] = str(settings.stories_file.absolute())
    if grader:
        try:
            figures["judge"] = judge.judge_stories(grader, told)
        except WorkFailed as error:
            figures["judge"] = {"failure": str(error)}
    return figures | facts


def lines_of(result: dict[str, Any]) -> list[str]:
    """Return what `assess` found as readable lines."""
    found = []
    if figures := result.get("blimp"):
        found += blimp.lines(figures)
    if figures := result.get("stories"):
        found += stories.lines(figures)
        if "n" in (grades := figures.get("judge") or {}):
            found += judge.lines(grades)
    return found
