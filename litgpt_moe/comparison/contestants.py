"""The models of a comparison (configurations, twins, siblings, variants), each with its settings."""

import contextlib
import dataclasses
import io
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from litgpt_moe.comparison.changes import check_changes, model_keys, training_flags
from litgpt_moe.comparison.identity import named_seed, nameless
from litgpt_moe.comparison.settings import PlaceSettings
from litgpt_moe.comparison.twin import changed_keys, dense_twin, with_experts
from litgpt_moe.config import ModelFacts, MoEConfig, has_open_vocabulary, model_facts
from litgpt_moe.files import write_whole
from litgpt_moe.hardware import training_device
from litgpt_moe.training.fit import proposed_rate
from litgpt_moe.training.parse import load_settings
from litgpt_moe.training.settings import Settings


@dataclass(frozen=True)
class Contestant:
    """One model of a comparison, and the settings that it is trained with."""

    config: MoEConfig
    facts: ModelFacts
    model_file: Path
    flags: tuple[str, ...]
    """Settings of a variant, as flags of run_train.py."""
    settings: Settings
    """What the training settings and the flags come to; rate, tokens and seed are set for each run."""
    reference: str | None = None
    """Name of the contestant that it is compared with: its dense twin, or else the first."""
    note: str = ""
    """How its width was chosen, if a tool chose it."""

    @property
    def name(self) -> str:
        """Its name, which no other contestant has."""
        return self.config.name

    def __str__(self) -> str:
        """Return the line about it that a plan prints."""
        facts, note = self.facts, f" ({self.note})" if self.note else ""
        sizes = f"{facts.total_params:,} parameters, {facts.active_params:,} active"
        return f"{self.name}: {sizes}, {facts.flops_per_token:,} FLOPs a token{note}"

    @property
    def block_size(self) -> int:
        """Tokens in a sequence."""
        return self.settings.train.max_seq_length or self.config.block_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step."""
        return self.settings.train.global_batch_size * self.block_size

    @property
    def named_rate(self) -> float | None:
        """The learning rate that its settings name, None if that is left to the rule."""
        rate = (self.settings.optimizer.get("init_args") or {}).get("lr")
        return float(rate) if isinstance(rate, int | float) else None

    @property
    def own_rate(self) -> float:
        """The learning rate that its settings name, or that the rule by its size proposes."""
        return self.named_rate or proposed_rate(self.config, self.facts)

    @property
    def end_share(self) -> float:
        """Where the decay ends, as a share of the learning rate: that of the settings, or a tenth."""
        return self.settings.train.min_lr / self.named_rate if self.named_rate else 0.1

    def whole_steps(self, tokens: float, flag: str) -> int:
        """Return the tokens of the whole steps that fit into `tokens`; ValueError, naming `flag`, if none."""
        if (n_steps := int(tokens // self.tokens_per_step)) < 1:
            step = f"less than a step of {self.tokens_per_step:,}"
            raise ValueError(f"{flag} comes to {tokens:,.0f} tokens for {self.name}, {step}; raise it")
        return n_steps * self.tokens_per_step

    def sees_batches_of(self, other: "Contestant") -> bool:
        """Return whether a run sees the same batches as the other's with the same seed."""
        sizes = [(one.block_size, one.tokens_per_step) for one in (self, other)]
        data = [(one.settings.data.get("class_path"), named_seed(one.settings)) for one in (self, other)]
        return sizes[0] == sizes[1] and data[0] == data[1]


def gather(
    configs: list[Path],
    settings: PlaceSettings,
    is_dense: bool,
    experts: list[int],
    overrides: dict[str, str],
    variants: list[tuple[str, dict[str, str]]],
    n_pieces: int,
) -> list[Contestant]:
    """Return all contestants in the order in which they are trained; their model files are written.

    `n_pieces` of the data's tokenizer are the vocabulary of a configuration that leaves it open.
    """
    check_changes("--override", overrides)
    for name, changes in variants:
        check_changes(f"--variant {name}", changes)
    found: list[Contestant] = []
    for path in configs:
        sizes = {"vocab_size": n_pieces} if has_open_vocabulary(path) else {}
        base = MoEConfig.from_file(path, **sizes, **model_keys(overrides))
        flags = training_flags(overrides)
        matches = [with_experts(base, n_expert) for n_expert in experts]
        siblings = [_add(found, settings, match.config, flags, match.how) for match in matches]
        own = siblings or [_add(found, settings, base, flags)]
        own += [_add(found, settings, *_varied(base, flags, *each)) for each in variants]
        for contestant in own if is_dense else []:
            if contestant.config.n_expert:
                # one for all siblings, whose FLOPs are those of `base` but for the rounding of widths
                match = dense_twin(base if siblings and contestant in siblings else contestant.config)
                twin = _add(found, settings, match.config, contestant.flags, match.how)
                at = next(i for i, other in enumerate(found) if other.name == contestant.name)
                found[at] = dataclasses.replace(contestant, reference=twin.name)
    check_vocabulary(found, n_pieces)
    first = found[0].name
    # a dense twin is what others are compared with; it is not compared itself
    references = {contestant.reference for contestant in found}
    return [
        contestant
        if contestant.reference or contestant.name in {first, *references}
        else dataclasses.replace(contestant, reference=first)
        for contestant in found
    ]


def _varied(
    base: MoEConfig, flags: tuple[str, ...], name: str, changes: dict[str, str]
) -> tuple[MoEConfig, tuple[str, ...], str]:
    values = {**model_keys(changes), "name": f"{base.name} {name}"}
    text = " ".join(f"{key}={value}" for key, value in changes.items())
    try:
        return dataclasses.replace(base, **values), (*flags, *training_flags(changes)), text
    except ValueError as error:
        raise ValueError(f"--variant {name}: {error}") from None


def _add(
    found: list[Contestant],
    settings: PlaceSettings,
    config: MoEConfig,
    flags: tuple[str, ...],
    note: str = "",
) -> Contestant:
    """Add a contestant, unless an equal one is there, and return it or that one."""
    for other in found:
        if (nameless(other.config), other.flags) == (nameless(config), flags):
            return other
    # by the names of their files, which on Windows are the same in capitals
    taken = {file_name(other.name).lower() for other in found}
    names = (f"{config.name}-{i}" if i > 1 else config.name for i in range(1, len(found) + 2))
    name = next(name for name in names if file_name(name).lower() not in taken)
    config = dataclasses.replace(config, name=name)
    file = settings.out / "models" / f"{file_name(name)}.yaml"
    write_whole(file, yaml.safe_dump(changed_keys(config), sort_keys=False))
    parsed = _settings_of(settings, file, flags)
    device = (parsed.accelerator, parsed.devices, parsed.num_nodes, parsed.precision)
    resolved = dataclasses.replace(parsed, precision=training_device(*device)[0])
    facts = model_facts(config, parsed.train.max_seq_length, is_tied=bool(parsed.train.tie_embeddings))
    found.append(Contestant(config, facts, file, flags, resolved, note=note))
    return found[-1]


def _settings_of(settings: PlaceSettings, model_file: Path, flags: tuple[str, ...]) -> Settings:
    """Return the settings that a model is trained with; ValueError if its runs could not be compared."""
    files = {"config": settings.config, "model_config": model_file, "data_dir": settings.data_dir}
    argv = [word for key, path in files.items() for word in (f"--{key}", str(path))]
    with contextlib.redirect_stderr(io.StringIO()):  # it says which files it takes: those that we name
        wanted = load_settings([*argv, *flags]).settings
    if wanted.schedule.progress == "time" or wanted.train.max_time is not None:
        rule = "a comparison gives each run its tokens: take train.max_time and schedule.progress out"
        raise ValueError(f"{settings.config}: {rule}, and give --match seconds")
    if wanted.initial_checkpoint_dir is not None:
        rule = "each run of a comparison starts from weights of its own seed"
        raise ValueError(f"{settings.config}: {rule}; take initial_checkpoint_dir out")
    return wanted


def file_name(name: str) -> str:
    """Return a name as part of a file's name on any system."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def check_vocabulary(contestants: list[Contestant], n_pieces: int) -> None:
    """Raise ValueError if the tokenizer of the data has more pieces than a model has rows."""
    for contestant in contestants:
        if n_pieces > (rows := contestant.config.padded_vocab_size or 0):
            way_out = f"--override vocab_size={n_pieces} padded_vocab_size={n_pieces}"
            text = (
                f"{contestant.name} has a padded_vocab_size of {rows}, the data's tokenizer {n_pieces} pieces"
            )
            raise ValueError(f"{text}; add {way_out}")
