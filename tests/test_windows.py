"""What Windows does otherwise, simulated: open files that block, long paths, its pipes, workers and names."""

import errno
import gc
import io
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import psutil
import pytest
import torch
from helpers.data import make_text, write_text
from helpers.runs import run, weights
from helpers.windows import WindowsFiles, busy_for

import evaluate
from litgpt_moe import cli, files, flags
from litgpt_moe.checkpoints.read_errors import is_read_error
from litgpt_moe.checkpoints.reader import trained_on
from litgpt_moe.data import workers
from litgpt_moe.data.batches import TokenBatches, TokenStream
from litgpt_moe.data.inputs import list_text
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.files import write_whole
from litgpt_moe.flags import FlagParser
from litgpt_moe.folders import new_folder, put_in_place
from litgpt_moe.generation.compiling import NoLibrary, load_library
from litgpt_moe.interop import export_folder
from litgpt_moe.training.folder_checks import check_path_lengths
from litgpt_moe.training.output import LastingStream
from litgpt_moe.training.settings import Settings, plain_settings
from tools import env_sanity_check, export_hf, import_hf
from tools.show_batch import data_dir_of

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; Windows itself has these rules")


@pytest.fixture
def like_windows(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """sys.platform says Windows; the seconds that files.py would have waited."""
    waited: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waited.append)
    monkeypatch.setattr(sys, "platform", "win32")
    return waited


# --- files that are open or mapped --------------------------------------------------------------------------


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[WindowsFiles]:
    """Windows' rules for open files, and no garbage collector, whose time nobody knows."""
    gc.collect()
    gc.disable()
    yield WindowsFiles(monkeypatch)
    gc.enable()


@on_linux
def test_the_rules_refuse_what_windows_refuses(rules: WindowsFiles, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "folder/file"
    folder.mkdir()
    file.write_bytes(b"1234")
    mapped = torch.from_file(str(file), size=4, dtype=torch.uint8)
    acts = (lambda: folder.rename(tmp_path / "other"), file.unlink, lambda: file.replace(tmp_path / "b"))
    for act in acts:
        with pytest.raises(PermissionError):
            act()
    assert len(rules.refused) == len(acts) and mapped[0] == ord("1")
    del mapped
    for act in acts[:1]:
        act()


@on_linux
@pytest.mark.usefixtures("eager", "workspace")
def test_a_run_renames_and_deletes_nothing_that_is_open(rules: WindowsFiles) -> None:
    flags = ("--eval.max_new_tokens", 4, "--checkpoints.keep_last", 2, "--train.save_interval", 2)
    assert run("--max_tokens", 4 * 256, *flags) == 0
    assert run("--max_tokens", 6 * 256, "--resume", "auto", *flags) == 0
    for name in ("final", "step-00000006"):
        file = Path("out", name, "lit_model.pth")
        state = torch.load(file, weights_only=True)
        state["model"]["lm_head.weight"][0] = float("nan")
        torch.save(state, file)
        (file.parent / "checkpoint.json").unlink()
    del state
    # both are mapped and found to be damaged; the run goes on from step 4 and puts them aside
    assert run("--max_tokens", 8 * 256, "--resume", "auto", *flags) == 0
    assert Path("out/superseded-step-00000006").is_dir()
    gc.collect()  # as at the end of a process
    initial = ("--initial_checkpoint_dir", "out", "--out_dir", "other", "--logger_name", "tensorboard")
    assert run("--max_tokens", 2 * 256, *initial, *flags) == 0
    assert run("--max_tokens", 2 * 256, "--out_dir", "other", "--overwrite", *flags) == 0
    assert rules.refused == []


@on_linux
@pytest.mark.usefixtures("eager")
def test_scoring_and_exporting_rename_and_delete_nothing_that_is_open(
    rules: WindowsFiles,
    tiny_checkpoint: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    scored = ["--ckpt_dir", str(tiny_checkpoint), "--data_dir", str(tiny_data), "--max_batches", "1"]
    assert evaluate.main(scored) == 0
    # Transformers maps the weights in the staging folder, which is then renamed
    assert export_hf.main([str(tiny_checkpoint), "exported", "--gguf"]) == 0
    assert import_hf.main(["exported", "imported"]) == 0
    monkeypatch.setattr(export_folder, "TOLERANCE", -1.0)  # as if the logits differed: all is deleted
    assert export_hf.main([str(tiny_checkpoint), "differs"]) == 1
    assert rules.refused == [] and not [path for path in tmp_path.iterdir() if "differs" in path.name]
    expected = weights(str(tiny_checkpoint))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights("imported").items())


@on_linux
def test_shards_that_a_run_has_open_outlive_a_new_preparation_until_the_next(
    rules: WindowsFiles, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    settings = PrepareSettings(data_dir=tmp_path, tokenizer_dir=tiny_tokenizer_dir, workers=1)
    write_text(tmp_path / "train/a.txt", make_text(30))
    prepare(settings)
    old = {tmp_path / shard["path"] for shard in read_manifest(tmp_path)["splits"]["train"]["shards"]}
    stream = TokenStream(tmp_path, "train")
    write_text(tmp_path / "train/a.txt", make_text(30, seed=1))
    prepare(settings)
    assert rules.refused and all(path.exists() for path in old) and len(stream) > 0
    del stream
    write_text(tmp_path / "train/a.txt", make_text(30, seed=2))
    prepare(settings)
    assert not any(path.exists() for path in old)


def test_a_file_that_a_virus_scanner_holds_is_replaced_a_little_later(
    like_windows: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "run.json", "old")
    with busy_for(3, lambda path: path.suffix == ".tmp", monkeypatch) as held:
        write_whole(tmp_path / "run.json", "new")
    assert len(held) == 3 and like_windows == [0.05, 0.1, 0.2]
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_folder_that_a_virus_scanner_holds_is_renamed_a_little_later(
    like_windows: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        busy_for(2, lambda path: path.suffix == ".tmp", monkeypatch) as held,
        new_folder(tmp_path / "out", 0) as staging,
    ):
        (staging / "file").touch()
    assert len(held) == 2 == len(like_windows)
    assert (tmp_path / "out/file").is_file()


def test_a_checkpoint_that_can_never_be_renamed_leaves_the_old_one_in_its_place(
    like_windows: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("final", "staging"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with (
        busy_for(100, lambda path: path.name == "staging", monkeypatch),
        pytest.raises(PermissionError, match="denied"),
    ):
        put_in_place(tmp_path / "staging", tmp_path / "final")
    assert 5 < sum(like_windows) < 10
    assert (tmp_path / "final/final").is_file()


def test_where_no_scanner_blocks_a_rename_nothing_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "win32":
        pytest.skip("there one waits")
    with busy_for(1, lambda path: path.suffix == ".tmp", monkeypatch), pytest.raises(PermissionError):
        write_whole(tmp_path / "run.json", "new")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_mapped_for_lack_of_memory_are_not_damaged() -> None:
    # torch's words on Windows; 1455: the page file is too small, 32: another program has the file open
    for words in ("could not create a map on file <{}>", "could not open file <{}> in read-only mode"):
        for code in (1455, 32):
            assert is_read_error(RuntimeError(f"{words.format('lit_model.pth')}; error code: <{code}>"))
    too_short = "file <lit_model.pth> size <3> is smaller than the required mapping size <9>; error code: <0>"
    assert not is_read_error(RuntimeError(too_short))


# --- paths --------------------------------------------------------------------------------------------------


def test_settings_are_saved_with_slashes_so_that_a_checkpoint_can_go_on_elsewhere() -> None:
    settings = replace(Settings(), out_dir=PureWindowsPath("D:\\my runs\\a"))  # pyright: ignore
    assert plain_settings(settings)["out_dir"] == "D:/my runs/a"


@pytest.mark.skipif(os.sep == "\\", reason="Windows reads both")
def test_data_are_found_by_the_settings_of_an_earlier_version_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trained_on({"dataset_dir": "data\\mine"}) == Path("data/mine")
    settings = {"out_dir": "runs\\a", "data": {"init_args": {"train_data_path": "data\\mine\\train"}}}
    assert trained_on(settings) == Path("data/mine")
    Path("here/data/mine").mkdir(parents=True)
    assert data_dir_of(Path("here/runs/a/final"), settings) == Path("here/data/mine").resolve()
    Path("a\\b").mkdir()  # a name as good as any other here
    assert trained_on({"dataset_dir": "a\\b"}) == Path("a\\b")


def test_texts_are_read_in_an_order_that_is_the_same_on_every_system(tmp_path: Path) -> None:
    for name in ("b.txt", "A.txt", "C.txt"):
        write_text(tmp_path / "train" / name, ["Once."])
    # by their names: paths compare without regard to case on Windows
    assert [source.path.name for source in list_text(tmp_path).text["train"]] == ["A.txt", "C.txt", "b.txt"]


def test_an_error_about_a_path_that_is_too_long_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def text(name: Path) -> str:
        return cli.explain(FileNotFoundError(errno.ENOENT, "No such file or directory", str(name)))[0]

    assert text(tmp_path / ("a" * 300)).endswith("check the path and its permissions")
    monkeypatch.setattr(sys, "platform", "win32")
    assert text(Path("short")).endswith("check the path and its permissions")
    assert "characters and Windows takes 259 unless" in text(tmp_path / ("a" * 300))


def test_an_out_dir_in_which_no_checkpoint_could_be_written_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def mkdir_of_windows(path: os.PathLike, *args: int) -> None:
        if len(os.fspath(path)) > 247:
            raise FileNotFoundError(errno.ENOENT, "The system cannot find the path specified", str(path))
        mkdir(path, *args)

    long = tmp_path.joinpath(*["x" * 20] * 20)
    monkeypatch.setattr(sys, "platform", "win32")
    check_path_lengths(long)  # long paths are switched on: a trial shows it
    assert not any(path.name.startswith(".") for path in long.iterdir())
    monkeypatch.setattr(os, "mkdir", mkdir_of_windows)
    with pytest.raises(ValueError, match=r"need paths of \d+ characters and Windows takes 259; choose"):
        check_path_lengths(long)
    check_path_lengths(tmp_path)


# --- streams and processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code_page", ["cp1252", "cp437"])
def test_text_that_a_code_page_lacks_ends_no_command(code_page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, before = "caf\u00e9 \u2581 \u732b", signal.getsignal(signal.SIGINT)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=code_page) for _ in range(3)]
    with pytest.raises(UnicodeEncodeError):
        print(text, file=streams[2], flush=True)
    monkeypatch.setattr(sys, "stdout", streams[0])
    try:
        assert cli.run_script(lambda: print(text, flush=True) or 0) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert streams[0].buffer.getvalue().decode("utf-8").rstrip() == text
    # this tool needs none of our modules
    monkeypatch.setattr(sys, "stdout", streams[1])
    line = env_sanity_check.Check("ok", "disk", f"9 GB free at {text}")
    monkeypatch.setattr(env_sanity_check, "run_checks", lambda _: [line])
    assert env_sanity_check.main([]) == 0
    sys.stdout.flush()
    assert b"caf\xe9" in streams[1].buffer.getvalue() or b"caf\x82" in streams[1].buffer.getvalue()
    assert b"\\u732b" in streams[1].buffer.getvalue()


class ClosedPipe:
    """A pipe whose reader has gone, as Windows tells it."""

    def write(self, text: str) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    flush = fileno = write

    def isatty(self) -> bool:
        return False


def test_a_pipe_that_is_closed_ends_a_command_in_silence(
    like_windows: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silenced: list[bool] = []
    for module in (cli, flags):
        monkeypatch.setattr(module, "silence_stdout", lambda: silenced.append(True))

    def work() -> None:
        ClosedPipe().write("text")

    assert cli.run_command(work) == 0 and silenced == [True]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", ClosedPipe())
        assert cli.run_command(lambda: "a result") == 0 and len(silenced) == 2
        with pytest.raises(SystemExit) as ended:
            FlagParser().parse_args(["--help"])
        assert ended.value.code == 0 and len(silenced) == 3
    assert capsys.readouterr().err == ""
    # a file that cannot be read is another matter, and so is this error elsewhere
    assert not cli.is_closed_pipe(OSError(errno.EINVAL, "Invalid argument", "file"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cli.run_command(work) == 2 and "Invalid argument" in capsys.readouterr().err


def test_a_pipe_that_is_closed_ends_no_training(like_windows: list[float]) -> None:
    silenced: list[bool] = []
    stream = LastingStream(ClosedPipe())  # pyright: ignore
    stream.silence = lambda: silenced.append(True)  # pyright: ignore
    assert stream.write("text") == 4 and silenced == [True]


def test_a_pool_has_no_more_workers_than_windows_can_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    large = 1 << 40
    assert (workers.n_workers(0, large), workers.n_workers(100, large)) == (128, 100)
    assert (workers.n_workers(0, 1), workers.n_workers(2, large)) == (1, 2)
    monkeypatch.setattr(sys, "platform", "win32")
    assert (workers.n_workers(0, large), workers.n_workers(100, large), workers.n_workers(2, large)) == (
        61,
        61,
        2,
    )
    workers.start_pool(workers.n_workers(0, large)).shutdown()  # with 62 it raises
    with pytest.raises(ValueError, match="max_workers must be <= 61"):
        workers.start_pool(62)


def test_what_a_worker_process_reads_can_be_sent_to_it(tiny_data: Path) -> None:
    # Windows and macOS start workers anew, and pickle what they work on
    batches = TokenBatches(TokenStream(tiny_data, "train"), 2, 16, seed=1, num_workers=1)
    sent = pickle.loads(pickle.dumps(batches))
    assert torch.equal(next(iter(replace(sent, num_workers=0))), next(iter(replace(batches, num_workers=0))))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_which_a_terminal_sends_to_the_workers_too_leaves_them_at_work(tiny_data: Path) -> None:
    stream = TokenStream(tiny_data, "train")
    alone = iter(TokenBatches(stream, 2, 16, seed=1))
    expected = [next(alone) for _ in range(12)]
    batches = iter(TokenBatches(stream, 2, 16, seed=1, num_workers=1))
    assert torch.equal(next(batches), expected[0])
    workers = psutil.Process().children()
    assert workers
    for worker in workers:
        for name in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            worker.send_signal(name)
    # more than are read ahead
    assert all(torch.equal(batch, next(batches)) for batch in expected[1:])


def test_no_code_is_compiled_where_the_compiler_s_flags_would_be_others(like_windows: list[float]) -> None:
    with pytest.raises(NoLibrary, match=r"needs Linux or macOS .* use --engine torch"):
        load_library()
