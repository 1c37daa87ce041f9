"""Files made to do harm: each is refused with one sentence by every script that reads it and runs nothing."""

import contextlib
import io
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import edit_yaml

import evaluate
import generate
import prepare_data
import run_train
import wandb_dataset
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.data.settings import DEFAULT_DATA_DIR
from litgpt_moe.files import is_network_share
from litgpt_moe.report.results import results_of
from litgpt_moe.scoring import data_of
from litgpt_moe.training.csv_log import CsvLog
from tools import inspect_checkpoint, show_batch

pytestmark = pytest.mark.usefixtures("eager", "workspace")

MARKER = "executed"  # a folder that hostile files try to make
TRAIN = ["--config", "train_config.yaml", "--model_config", "model_config.yaml"]
CHECKPOINT_READERS = {
    "generate": lambda folder: generate.main(["--ckpt_dir", folder, "--max_tokens", "1", "--prompt", "Tom"]),
    "evaluate": lambda folder: evaluate.main(["--ckpt_dir", folder, "--max_batches", "1", "--data_dir", "d"]),
    "inspect": lambda folder: inspect_checkpoint.main([folder, "--tensors"]),
    "initial": lambda folder: run_train.main([*TRAIN, "--initial_checkpoint_dir", folder]),
    "resume": lambda folder: run_train.main([*TRAIN, "--resume", folder]),
}


class Harm:
    """An object whose unpickling makes a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (MARKER,)


def assert_refused(status: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Exactly one sentence, no code run, nothing trained."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status in (1, 2) and len(errors) == 1, errors
    assert len(errors[0]) < 700
    for word in words:
        assert word in errors[0]
    assert not Path(MARKER).exists() and not Path("out").exists()


# --- places -------------------------------------------------------------------------------------------------

SHARES = [
    "//host/share/d",
    "\\\\host\\share\\d",
    "/\\host/share/d",
    "\\\\?\\UNC\\host\\share\\d",
    "\\??\\UNC\\host\\s\\d",
]


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths at which anything looks."""
    paths: list[str] = []

    def recorded(look: Callable) -> Callable:
        def record(path: object, *args: object, **options: object) -> object:
            paths.append(str(path))
            return look(path, *args, **options)

        return record

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, recorded(getattr(os, name)))
    return paths


@pytest.mark.parametrize("share", SHARES)
def test_no_network_share_that_a_checkpoint_names_is_looked_at(
    share: str, tiny_checkpoint: Path, looked_at: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # on Windows a look at it logs in there, with this user's name
    folder = Path(shutil.copytree(tiny_checkpoint, "run/final"))
    result = {"checkpoint": {"path": f"{share}/final", "sha256": "0"}, "data": {}, "time": "", "loss": 1}
    Path("run/results.jsonl").write_text(json.dumps(result), encoding="utf-8")
    for settings in ({"data_dir": share}, {"data": {"init_args": {"train_data_path": f"{share}/train"}}}):
        whole = {"train": {"max_tokens": 64}, "data": {"class_path": "prepare_data.TextShards"}} | settings
        whole["data"] = {"class_path": "prepare_data.TextShards"} | whole["data"]
        (folder / "train_config.yaml").write_text(yaml.dump(whole), encoding="utf-8")
        assert data_of(folder) == DEFAULT_DATA_DIR
        assert "is a network share: it is read only where --data_dir names it" in capsys.readouterr().err
        assert show_batch.main(["run", "--step", "1"]) == 2
        assert "is a network share, read only where you name it" in capsys.readouterr().err
    assert results_of(Path("run"), [Path("run/results.jsonl")]) == []
    assert looked_at and not [name for name in looked_at if "host" in name]


def test_a_drive_of_this_machine_is_no_network_share() -> None:
    local = ["d", "/home/me/d", "C:/d", "C:\\d", "\\\\?\\C:\\d", "\\\\.\\C:\\d", "\\d", "..\\d"]
    assert not [name for name in local if is_network_share(name)]
    hidden = "\\\\.\\C:\\..\\UNC\\host\\share"
    assert all(map(is_network_share, [*SHARES, hidden]))


# --- weights ------------------------------------------------------------------------------------------------


def zipped(state: object) -> bytes:
    """The state as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


# more such files: tests/checkpoints/test_hostile_files.py
WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "code in a zip": lambda good: zipped({"model": Harm()}),
    "code beside good weights": lambda good: zipped({**load(good), "rng": Harm()}),
    "code in a pickle of its own": lambda good: pickle.dumps({"model": Harm()}),
    "values that one number stands for": lambda good: zipped(
        {"model": {**load(good)["model"], "lm_head.weight": torch.zeros(1).expand(1 << 40)}}
    ),
    "text in place of tensors": lambda good: zipped(
        {"model": dict.fromkeys(load(good)["model"], "x" * 10**5)}
    ),
    "half of the file": lambda good: good[: len(good) // 2],
}


def load(data: bytes) -> dict:
    return torch.load(io.BytesIO(data), weights_only=True)


@pytest.fixture
def checkpoint(workspace: Path, tiny_checkpoint: Path, tiny_data: Path) -> Path:
    """A checkpoint to spoil, with the data that it was made for in `d`."""
    shutil.copytree(tiny_checkpoint, "checkpoint")
    shutil.copy("train_config.yaml", "checkpoint")
    shutil.copytree(tiny_data, "d")
    return Path("checkpoint")


@pytest.mark.parametrize("reader", CHECKPOINT_READERS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_made_to_do_harm_are_refused(
    checkpoint: Path, name: str, reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "lit_model.pth"
    path.write_bytes(WEIGHTS[name](path.read_bytes()))
    assert_refused(CHECKPOINT_READERS[reader](str(checkpoint)), capsys, "checkpoint")


# --- configurations, settings, tokenizers -------------------------------------------------------------------

LAUGHS = "extra:\n  a: &a [x, x, x]\n" + "".join(
    f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = {
    "code": f"extra: !!python/object/apply:os.mkdir [{MARKER}]\n",
    "a name to import": "extra: !!python/name:os.system\n",
    "a billion laughs": LAUGHS,
    "brackets in brackets": "extra: " + "[" * 20_000,
    "an alias of itself": "extra: &a [*a]\n",
    "a megabyte": "extra: " + "x" * 10**6,
}


@pytest.mark.parametrize("reader", [*CHECKPOINT_READERS, "train"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_made_to_do_harm_is_refused(
    checkpoint: Path, name: str, reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = (
        Path("model_config.yaml")
        if reader in ("train", "initial", "resume")
        else checkpoint / "model_config.yaml"
    )
    with path.open("a", encoding="utf-8") as file:
        file.write(CONFIGS[name])
    status = run_train.main(TRAIN) if reader == "train" else CHECKPOINT_READERS[reader](str(checkpoint))
    assert_refused(status, capsys, "model_config.yaml")


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_made_to_do_harm_are_refused(
    workspace: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Path("train_config.yaml").open("a", encoding="utf-8") as file:
        file.write(CONFIGS[name])
    assert_refused(run_train.main(TRAIN), capsys, "train_config.yaml")


@pytest.mark.parametrize("key", ["data", "optimizer"])
@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "antigravity.fly",
        "subprocess.Popen",
        "run_train.main",
        "builtins.eval",
        "torch.nn.Linear",
    ],
)
def test_a_class_path_that_names_no_such_class_is_refused_before_a_call(
    workspace: Path,
    key: str,
    path: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_yaml("train_config.yaml", key, {"class_path": path, "init_args": {"command": f"mkdir {MARKER}"}})
    assert_refused(run_train.main(TRAIN), capsys, f"{key}.class_path is {path}, which cannot be used")


@pytest.mark.parametrize("key", ["n_embd", "n_layer", "padded_vocab_size", "block_size", "n_expert"])
def test_a_model_of_petabytes_is_refused(
    workspace: Path,
    key: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_yaml("model_config.yaml", key, 10**8)
    assert run_train.main(TRAIN) == 2
    assert "model_config.yaml" in capsys.readouterr().err and not Path("out").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "\x00", '{"version": "1.0"}'])
@pytest.mark.parametrize("reader", ["generate", "evaluate", "inspect"])
def test_a_tokenizer_made_to_do_harm_is_refused(
    checkpoint: Path, reader: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "tokenizer.json").write_text(text, encoding="utf-8")
    assert_refused(CHECKPOINT_READERS[reader](str(checkpoint)), capsys)


@pytest.mark.parametrize("name", ["lit_model.pth", "model_config.yaml", "tokenizer.json", "notes.txt"])
@pytest.mark.parametrize("reader", CHECKPOINT_READERS)
def test_a_link_out_of_a_checkpoint_is_refused(
    checkpoint: Path, reader: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Path("elsewhere").resolve()
    target.write_bytes((checkpoint / name).read_bytes() if (checkpoint / name).exists() else b"")
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(target)
    assert_refused(CHECKPOINT_READERS[reader](str(checkpoint)), capsys, "is a link out of its folder")


# --- links in a folder that is written to -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["logs", "logs/csv", "logs/csv/metrics.csv", "logs/run.json", "logs/new.csv"]
)
@pytest.mark.parametrize("target", ["elsewhere", "absent"])
def test_a_run_is_not_written_through_a_link(
    workspace: Path, name: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("elsewhere").mkdir()
    Path("stranger", name).parent.mkdir(parents=True)
    Path("stranger", name).symlink_to(Path(target).absolute())
    status = run_train.main([*TRAIN, "--out_dir", "stranger", "--resume", "auto"])
    assert_refused(status, capsys, str(Path("stranger", name)), "is a link", "delete it")
    assert not Path("absent").exists() and not any(Path("elsewhere").iterdir())


def test_a_log_that_becomes_a_link_while_training_is_not_followed(workspace: Path) -> None:
    if not hasattr(os, "O_NOFOLLOW"):
        pytest.skip("this system follows links")
    log = CsvLog(Path("log.csv"), ["step"])
    log.write({"step": 1})
    Path("log.csv").rename("elsewhere")
    before = Path("elsewhere").read_bytes()
    Path("log.csv").symlink_to("elsewhere")
    with contextlib.suppress(OSError):
        log.write({"step": 2})
    assert Path("elsewhere").read_bytes() == before


@pytest.mark.parametrize("name", ["train", "val", "train/train", "val/val"])
def test_shards_are_not_written_through_a_link(
    workspace: Path, tiny_data: Path, tiny_tokenizer_dir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, "d")
    Path("d/manifest.json").unlink()
    Path("d", name).rename("elsewhere")
    Path("d", name).symlink_to(Path("elsewhere").absolute())
    before = sorted(Path("elsewhere").rglob("*"))
    flags = [
        "--data_dir",
        "d",
        "--tokenizer_dir",
        str(tiny_tokenizer_dir),
        "--workers",
        "1",
        "--separator",
        ".",
    ]
    assert_refused(prepare_data.main(flags), capsys, f"{Path('d', name)} is a link")
    assert sorted(Path("elsewhere").rglob("*")) == before


@pytest.mark.parametrize("kind", ["carried", "trained", "brought"])
def test_a_tokenizer_is_not_written_through_a_link_in_the_data_directory(
    workspace: Path, tiny_data: Path, tiny_tokenizer_dir: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, "d", ignore=shutil.ignore_patterns("manifest.json", "tokenizer"))
    Path("elsewhere").mkdir()
    Path("d/tokenizer").symlink_to(Path("elsewhere").absolute())
    flags = {
        "carried": ["--data_dir", "d", "--tokenizer_dir", str(tiny_tokenizer_dir)],
        "trained": ["text", "--data_dir", "d", "--train_tokenizer", "400"],
        "brought": ["--data_dir", "d", "--tokenizer", str(tiny_tokenizer_dir)],
    }
    if kind == "trained":
        Path("d/train").rename("text")
        shutil.rmtree("text/train")
        shutil.rmtree("d/val")
    status = prepare_data.main([*flags[kind], "--workers", "1", "--separator", "."])
    if kind == "carried":
        assert status == 0 and "d/tokenizer is a link" in capsys.readouterr().err
    else:
        assert_refused(status, capsys, "d/tokenizer is a link")
    assert not any(Path("elsewhere").iterdir())


def test_no_folder_is_deleted_behind_a_link(
    workspace: Path, tiny_data: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, "d")
    Path("d/val").rename("elsewhere")
    shutil.rmtree("elsewhere/val")
    Path("elsewhere/val").mkdir()
    Path("d/val").symlink_to(Path("elsewhere").absolute())
    flags = ["--data_dir", "d", "--tokenizer_dir", str(tiny_tokenizer_dir), "--workers", "1"]
    assert_refused(prepare_data.main([*flags, "--separator", "."]), capsys, "d/val is a link")
    assert Path("elsewhere/val").is_dir()


# --- pipes under the names of files -------------------------------------------------------------------------


@contextlib.contextmanager
def never_opened(path: Path) -> Iterator[None]:
    """A pipe at `path`: the test fails if it is opened, which would wait for ever for somebody to write."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    opened = threading.Event()

    def write() -> None:
        with contextlib.suppress(OSError), path.open("wb"):  # waits for a reader
            opened.set()

    threading.Thread(target=write, daemon=True).start()
    yield
    assert not opened.is_set(), f"{path} was opened"
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # ends the thread


needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@needs_pipes
@pytest.mark.parametrize(
    "name",
    [
        "lit_model.pth",
        "model_config.yaml",
        "tokenizer.json",
        "checkpoint.json",
        "tokenizer_config.json",
        "generation_config.json",
        "train_config.yaml",
        "tokenizer.model",
        "config.json",
    ],
)
@pytest.mark.parametrize("reader", CHECKPOINT_READERS)
def test_no_pipe_in_a_checkpoint_is_opened(checkpoint: Path, reader: str, name: str) -> None:
    with never_opened(checkpoint / name):
        CHECKPOINT_READERS[reader](str(checkpoint))


@needs_pipes
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "artifact.json",
        "tokenizer/tokenizer.json",
        "tokenizer/.copied_from.json",
        "train/stories.txt",
    ],
)
def test_no_pipe_in_a_data_directory_is_opened(
    workspace: Path, tiny_data: Path, tiny_tokenizer_dir: Path, name: str
) -> None:
    shutil.copytree(tiny_data, "d")
    path = Path("d", name)
    path.parent.mkdir(exist_ok=True)
    if path.name == "tokenizer.json":
        mark = {"name": "x", "sha256": "0"}
        path.with_name(".copied_from.json").write_text(json.dumps(mark), encoding="utf-8")
    if path.suffix == ".txt":
        manifest = json.loads(Path("d/manifest.json").read_text(encoding="utf-8"))
        manifest["splits"]["train"]["text"][0]["size"] = 0
        Path("d/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    flags = ["--data_dir", "d", "--workers", "1"]
    with never_opened(path):
        prepare_data.main([*flags, "--tokenizer_dir", str(tiny_tokenizer_dir)])
        prepare_data.main([*flags, "--tokenizer", str(tiny_tokenizer_dir)])
        run_train.main([*TRAIN, "--data.train_data_path", "d/train", "--max_steps", "1"])
        wandb_dataset.main(["verify", "--data_dir", "d"])


# --- data directories ---------------------------------------------------------------------------------------


def edit_shard(key: str, value: object) -> Callable[[dict], None]:
    return lambda manifest: manifest["splits"]["val"]["shards"][0].update({key: value})


MANIFESTS: dict[str, Callable[[dict], None]] = {
    **{
        f"path {path}": edit_shard("path", path)
        for path in ("../d/x.bin", "/etc/passwd", "C:\\x", "\\\\host\\x", "")
    },
    **{f"n_tokens {n}": edit_shard("n_tokens", n) for n in (10**15, -1, 0, "7", None)},
    **{
        f"dtype {kind}": (lambda m, kind=kind: m.update(dtype=kind))
        for kind in ("O", "float64", "V9", ["u2"])
    },
    "other count": lambda m: m["splits"]["val"].update(n_tokens=1),
    "shards that are no list": lambda m: m["splits"]["val"].update(shards={"a": 1}),
    "a vocabulary that is not the tokenizer's": lambda m: m["tokenizer"].update(vocab_size=9**9),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused(
    checkpoint: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("d/manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    MANIFESTS[name](manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert_refused(CHECKPOINT_READERS["evaluate"]("checkpoint"), capsys, "prepare_data.py")


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shard,) = Path("d/val/val").glob("*.bin")
    shard.rename("elsewhere")
    shard.symlink_to(Path("elsewhere").resolve())
    assert_refused(CHECKPOINT_READERS["evaluate"]("checkpoint"), capsys, "a link out of its folder")
    assert_refused(wandb_dataset.main(["verify", "--data_dir", "d"]), capsys, "a link out of its folder")


# --- the launcher's variables -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [("RANK", "first"), ("LOCAL_RANK", "-1"), ("WORLD_SIZE", "8"), ("WORLD_SIZE", "0x2"), ("RANK", "5")],
)
def test_a_variable_of_a_launcher_that_makes_no_sense_is_named(
    workspace: Path,
    name: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, text)
    assert_refused(run_train.main(TRAIN), capsys, f"${name} is ", text)


def test_a_negative_number_of_machines_is_named_by_its_key(
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_refused(run_train.main([*TRAIN, "--num_nodes", "-297"]), capsys, "num_nodes is -297")


@pytest.mark.parametrize("key", ["norm_eps", "n_embd", "rope_base"])
def test_null_where_the_model_needs_a_value_is_refused(
    workspace: Path,
    key: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_yaml("model_config.yaml", key, None)
    assert_refused(run_train.main(TRAIN), capsys, f"{key} is None; it must be")


def test_shards_with_counts_that_are_no_numbers_are_made_again(
    checkpoint: Path, tiny_tokenizer_dir: Path, tiny_data: Path
) -> None:
    path = Path("d/manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["splits"]["train"]["shards"][0]["n_stories"] = "dtype"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    flags = ["--data_dir", "d", "--tokenizer_dir", str(tiny_tokenizer_dir), "--workers", "1"]
    assert prepare_data.main(flags) == 0
    was = read_manifest(tiny_data)["splits"]["train"]["n_stories"]
    assert read_manifest(Path("d"))["splits"]["train"]["n_stories"] == was
