"""Mutated settings, configurations, data and checkpoints: a right run or clear messages, never more.

FUZZ_CASES sets the cases of each long test (1,000), FUZZ_SEED other ones than the fixed first.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import weights
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import evaluate
import generate
import prepare_data
import run_train
import wandb_dataset
from litgpt_moe.training import summary
from litgpt_moe.training.run import Run
from litgpt_moe.training.settings import Settings
from litgpt_moe.training.steps import RunFailed, StopSignals
from tools import inspect_checkpoint

pytestmark = pytest.mark.usefixtures("lightning_log", "eager", "workspace")

LONG = int(os.environ.get("FUZZ_CASES", "1000"))
TRAIN = ["--config", "train_config.yaml", "--model_config", "model_config.yaml", "--dataset_dir", "d"]
SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))  # a case that takes longer hangs
MEMORY = 8 << 30
MAX_TOKENS_PER_STEP = 4096

VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**15, 10**30, -(10**30), 0.5, -0.0, 1e-9, 1e308]
    ),
    st.sampled_from(
        [float("inf"), float("nan"), "", "auto", "x", "1e3", "~", "\x00", "\ud83d\ude00", "../x"]
    ),
    st.sampled_from([[], {}, [1], {"a": 1}, [[]], {"class_path": "os.system"}, "x" * 300]),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
).map(copy.deepcopy)  # a list that a case changes must not stay so for the next


def fuzz(cases: int) -> Callable:
    """Settings of a test: the same cases each time, unless FUZZ_SEED is set."""
    chosen = os.environ.get("FUZZ_SEED")
    options = settings(
        max_examples=cases,
        derandomize=chosen is None,
        database=None,
        phases=[Phase.generate],  # a case takes up to seconds: told as found, not made small
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: options(test if chosen is None else seed(int(chosen))(test))


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """End a case that hangs or takes too much memory with an error, where the system can."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    import resource

    def hang(*_: object) -> None:
        raise AssertionError(f"no end after {SECONDS} s")

    before, soft = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        if Path("/proc/self/statm").exists()
        else 0
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, soft[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, soft)


@pytest.fixture(scope="session")
def lightning_log() -> None:
    """Import Lightning before `capsys` comes: its log goes for ever to the stream that it then finds."""
    import lightning  # noqa: F401


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[Callable[[list], int], list], int]]:
    """A function that runs a script: status 0, or 1 or 2 with messages. An exception fails the test.

    Of all cases together some must be used and some refused, or the test would accept anything.
    """
    statuses: set[int] = set()

    def run(main: Callable[[list], int], argv: list) -> int:
        with limits():
            status = main(argv)
        err = capsys.readouterr().err
        assert status in (0, 1, 2) and "Traceback" not in err, err
        assert status == 0 or "error: " in err or main is inspect_checkpoint.main
        statuses.add(status)
        return status

    yield run
    assert 0 in statuses and statuses & {1, 2}


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch, tiny_data: Path, check: Callable) -> None:
    """Have a run that passed its checks end after one step; a large one, before. Unchanged files do pass."""
    train = run_train.train
    shutil.copytree(tiny_data, "d")

    def short(run: Run, stops: StopSignals) -> object:
        settings, rows = run.settings, run.config.n_layer * run.config.n_embd * run.config.padded_vocab_size
        is_small = (
            run.tokens_per_step <= MAX_TOKENS_PER_STEP
            and rows < 10**7
            and run.devices * settings.num_nodes == 1
        )
        if (
            not is_small
            or settings.compile == "on"
            or settings.logger_name != "csv"
            or run.data.num_workers > 2
        ):
            raise RunFailed("passed the checks")
        one_step = replace(settings.train, max_tokens=run.tokens_per_step)
        return train(replace(run, settings=replace(settings, train=one_step)), stops)

    monkeypatch.setattr(run_train, "train", short)
    monkeypatch.setattr(summary, "final_story", lambda _: "")
    assert check(run_train.main, TRAIN) == 0


def leaves(node: object, path: tuple = ()) -> Iterator[tuple]:
    """The places of a nested value, inner ones too."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def mutate(draw: Callable, content: dict, extra: tuple[str, ...] = ()) -> dict:
    """The content with one to three values replaced, removed or added."""
    for _ in range(draw(st.integers(1, 3))):
        places = [*leaves(content), *((key,) for key in extra), ("typo",)]
        *path, last = draw(st.sampled_from(places))
        target = content
        for key in path:
            target = target[key]
        if draw(st.integers(0, 5)) == 0 and (
            last in target if isinstance(target, dict) else last < len(target)
        ):
            del target[last]
        else:
            target[last] = draw(VALUES)
    return content


def mutate_bytes(draw: Callable, data: bytes) -> bytes:
    """The data cut, prolonged, or with some bytes replaced."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "replace", "insert", "remove"]))
        new = draw(st.binary(max_size=8))
        rest = {"cut": b"", "replace": data[at + len(new) :], "insert": data[at:], "remove": data[at + 8 :]}[
            kind
        ]
        data = data[:at] + new + rest
    return data


def write_yaml(draw: Callable, path: str, extra: tuple[str, ...]) -> None:
    """Mutate a YAML file in its values or, one time in four, in its text."""
    original = Path(path).with_suffix(".orig")
    if not original.exists():
        shutil.copy(path, original)
    text = original.read_text(encoding="utf-8")
    if draw(st.integers(0, 3)) == 0:
        Path(path).write_bytes(mutate_bytes(draw, text.encode()))
    else:
        content = mutate(draw, yaml.safe_load(text), extra)
        Path(path).write_text(yaml.dump(content, allow_unicode=True), encoding="utf-8")


def run_yaml_case(check: Callable, data: st.DataObject) -> None:
    for name in os.listdir():  # noqa: PTH208
        if name not in (
            "d",
            "train_config.yaml",
            "train_config.orig",
            "model_config.yaml",
            "model_config.orig",
        ):
            shutil.rmtree(name, ignore_errors=True)
    which = data.draw(st.sampled_from(["train", "train", "model", "both"]))
    for kind, fields in (("train", Settings), ("model", None)):
        extra = (
            tuple(fields.__dataclass_fields__)
            if fields
            else ("n_query_groups", "bias", "head_size", "norm_eps")
        )
        extra = tuple(
            key for key in extra if key not in ("config", "wandb_dataset", "initial_checkpoint_dir")
        )
        if which in (kind, "both"):
            write_yaml(data.draw, f"{kind}_config.yaml", extra)
        elif Path(f"{kind}_config.orig").exists():
            shutil.copy(f"{kind}_config.orig", f"{kind}_config.yaml")
    check(run_train.main, TRAIN)


@fuzz(40)
@given(data=st.data())
def test_mutated_yaml_trains_or_is_refused(check: Callable, one_step: None, data: st.DataObject) -> None:
    run_yaml_case(check, data)


@pytest.mark.slow
@fuzz(LONG)
@given(data=st.data())
def test_much_mutated_yaml_trains_or_is_refused(check: Callable, one_step: None, data: st.DataObject) -> None:
    run_yaml_case(check, data)


def run_data_case(check: Callable, draw: Callable, sources: tuple[Path, Path, Path]) -> None:
    tiny_data, tokenizer_dir, checkpoint = sources
    shutil.rmtree("d", ignore_errors=True)
    shutil.copytree(tiny_data, "d")
    if draw(st.booleans()):
        path = Path("d/manifest.json")
        path.write_text(
            json.dumps(mutate(draw, json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8"
        )
    else:
        names = sorted(p.relative_to("d").as_posix() for p in Path("d").rglob("*") if p.is_file())
        path = Path("d", draw(st.sampled_from(names)))
        path.write_bytes(mutate_bytes(draw, path.read_bytes()))
    flags = ["--data_dir", "d", "--ckpt_dir", str(checkpoint), "--max_batches", "1", "--results_file", "none"]
    check(evaluate.main, flags)
    check(wandb_dataset.main, ["verify", "--data_dir", "d"])
    check(prepare_data.main, ["--data_dir", "d", "--tokenizer_dir", str(tokenizer_dir), "--workers", "1"])


@fuzz(25)
@given(data=st.data())
def test_mutated_shards_and_manifests_are_used_or_refused(
    check: Callable, tiny_data: Path, tiny_tokenizer_dir: Path, tiny_checkpoint: Path, data: st.DataObject
) -> None:
    run_data_case(check, data.draw, (tiny_data, tiny_tokenizer_dir, tiny_checkpoint))


@pytest.mark.slow
@fuzz(LONG)
@given(data=st.data())
def test_much_mutated_shards_and_manifests_are_used_or_refused(
    check: Callable, tiny_data: Path, tiny_tokenizer_dir: Path, tiny_checkpoint: Path, data: st.DataObject
) -> None:
    run_data_case(check, data.draw, (tiny_data, tiny_tokenizer_dir, tiny_checkpoint))


def run_checkpoint_case(check: Callable, draw: Callable, source: Path) -> None:
    shutil.rmtree("checkpoint", ignore_errors=True)
    shutil.copytree(source, "checkpoint")
    path = draw(st.sampled_from(sorted(Path("checkpoint").iterdir())))
    if path.suffix == ".json" and draw(st.booleans()):
        content = mutate(draw, json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        path.write_bytes(mutate_bytes(draw, path.read_bytes()))
    check(generate.main, ["--ckpt_dir", "checkpoint", "--max_tokens", "1", "--prompt", "Tom"])
    check(inspect_checkpoint.main, ["checkpoint"])


@fuzz(25)
@given(data=st.data())
def test_mutated_checkpoints_are_used_or_refused(
    check: Callable, tiny_checkpoint: Path, data: st.DataObject
) -> None:
    run_checkpoint_case(check, data.draw, tiny_checkpoint)


@pytest.mark.slow
@fuzz(LONG)
@given(data=st.data())
def test_much_mutated_checkpoints_are_used_or_refused(
    check: Callable, tiny_checkpoint: Path, data: st.DataObject
) -> None:
    run_checkpoint_case(check, data.draw, tiny_checkpoint)


def tensors(draw: Callable) -> torch.Tensor:
    shape = draw(st.sampled_from([(), (1,), (4,), (16,), (512, 16), (0,)]))
    dtype = draw(st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool, torch.complex64]))
    return torch.full(shape, draw(st.sampled_from([0, 1, 255])), dtype=dtype)


def state_places(node: object, path: tuple = ()) -> Iterator[tuple]:
    """The places of a training state, the 625 numbers of a generator's left out."""
    items = (
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    )
    for key, value in itertools.islice(items, 60):
        yield (*path, key)
        yield from state_places(value, (*path, key))


def changed(node: object, path: tuple, change: Callable[[object], object]) -> object:
    """The nested value with another one at `path`; `change` returns ... to remove it."""
    if not path:
        return change(node)
    key, *rest = path
    value = changed(node[key], tuple(rest), change)
    if isinstance(node, dict):
        return {k: value if k == key else v for k, v in node.items() if k != key or value is not ...}
    parts = [value if i == key else part for i, part in enumerate(node) if i != key or value is not ...]
    return tuple(parts) if isinstance(node, tuple) else parts


def mutate_state(draw: Callable, state: dict) -> tuple[dict, list[tuple]]:
    """The state with one or two parts replaced or removed, and their places."""
    places = []
    for _ in range(draw(st.integers(1, 2))):
        part = draw(st.sampled_from(sorted(state)))  # or most would be in the many weights and moments
        path = draw(st.sampled_from([(part,), *state_places(state[part], (part,))]))
        kind = draw(st.sampled_from(["value", "tensor", "remove", "near", "shorter"]))
        # outside of `change`, so that a case draws as much whatever is at its place
        value, step = draw(VALUES) if kind == "value" else None, draw(st.sampled_from([-1, 1]))
        new = tensors(draw) if kind == "tensor" else ... if kind == "remove" else value

        def change(old: object, kind: str = kind, new: object = new, step: int = step) -> object:
            if kind == "near" and type(old) in (int, float):
                return old + step
            if kind == "shorter" and isinstance(old, str | list | tuple | torch.Tensor):
                return old[:1] if not isinstance(old, torch.Tensor) or old.ndim else old.int()
            return old if kind in ("near", "shorter") else new

        state = changed(state, path, change)
        places.append(path)
        if not state:
            break
    return state, places


HARMLESS = (  # another value of the same kind is as good a state: it is told, or nobody can know
    ("train_dataloader",),
    ("model",),
    ("optimizer", "state"),
)


def run_state_case(check: Callable, draw: Callable) -> None:
    for name in ("out", "case"):
        shutil.rmtree(name, ignore_errors=True)
    shutil.copytree("whole", "out")
    step = Path("out/step-00000002")
    state, places = mutate_state(draw, torch.load(step / "lit_model.pth", weights_only=True))
    torch.save(state, step / "lit_model.pth")
    record = json.loads((step / "checkpoint.json").read_text(encoding="utf-8"))
    content = (step / "lit_model.pth").read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record["files"]["lit_model.pth"] = entry  # all hashes agree: the state alone can tell
    (step / "checkpoint.json").write_text(json.dumps(record), encoding="utf-8")
    status = check(run_train.main, [*TRAIN, *STATE_RUN, "--resume", str(step)])
    if status == 0 and not any(place[: len(part)] == part for place in places for part in HARMLESS):
        right = weights("right")
        assert all(torch.equal(tensor, right[name]) for name, tensor in weights("out/final").items()), places


STATE_RUN = ["--max_tokens", str(3 * 256), "--train.save_interval", "2", "--eval.interval", "1000"]


@pytest.fixture
def three_steps(tiny_data: Path) -> None:
    """A run of three steps: right/ is its end, whole/ has the checkpoint of the second."""
    shutil.copytree(tiny_data, "d")
    assert run_train.main([*TRAIN, *STATE_RUN]) == 0
    Path("out/final").rename("right")
    Path("out").rename("whole")


@fuzz(20)
@given(data=st.data())
def test_a_mutated_training_state_is_gone_on_from_rightly_or_refused(
    check: Callable, three_steps: None, data: st.DataObject
) -> None:
    run_state_case(check, data.draw)


@pytest.mark.slow
@fuzz(LONG)
@given(data=st.data())
def test_a_much_mutated_training_state_is_gone_on_from_rightly_or_refused(
    check: Callable, three_steps: None, data: st.DataObject
) -> None:
    run_state_case(check, data.draw)
