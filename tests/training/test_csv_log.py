"""The CSV files of a run: their columns, what a resume keeps, and what a kill or a lock does to them."""

import csv
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import TINY_CONFIG

from litgpt_moe.config import MoEConfig
from litgpt_moe.training import csv_log
from litgpt_moe.training.csv_log import CsvLog, RunLogs, metric_columns


def lines(log: CsvLog) -> list[str]:
    return log.path.read_text(encoding="utf-8").splitlines()


def test_the_columns_of_the_metrics_are_those_of_the_model_s_moe_layers() -> None:
    columns = metric_columns(MoEConfig(**{**TINY_CONFIG, "n_layer": 3, "first_k_dense_replace": 1}))
    assert columns[:2] == ["step", "total_tokens"] and columns[-2:] == ["val_loss", "val_ppl"]
    routers = [column.removeprefix("moe/") for column in columns if column.startswith("moe/")]
    names = ("load_imbalance", "dead_experts", "router_entropy", "aux_loss", "z_loss")
    assert routers == [f"{name}/layer_{layer}" for layer in ("01", "02") for name in names]


def test_a_dense_model_has_no_columns_of_routers() -> None:
    config = MoEConfig(
        **{**TINY_CONFIG, "mlp_class_name": "LLaMAMLP", "n_expert": 0, "intermediate_size": 32}
    )
    assert not any(column.startswith("moe/") for column in metric_columns(config))


def test_a_row_leaves_the_columns_that_it_lacks_empty(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "logs/metrics.csv", ["step", "loss", "val_loss"])
    log.write({"step": 1, "loss": 3.0})
    log.write({"step": 1, "val_loss": 2.5})
    log.write({"loss": 2.0, "step": 2})
    assert lines(log) == ["step,loss,val_loss", "1,3.0,", "1,,2.5", "2,2.0,"]


def test_a_column_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="los"):
        CsvLog(tmp_path / "metrics.csv", ["step", "loss"]).write({"step": 1, "los": 3.0})


def test_a_run_that_died_before_its_first_checkpoint_begins_its_log_anew(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv", ["step", "loss"])
    log.write({"step": 1, "loss": 2.0})
    again = CsvLog(log.path, ["step", "loss"])
    again.keep(0)
    again.write({"step": 1, "loss": 3.0})
    assert lines(log) == ["step,loss", "1,3.0"]


def test_a_log_of_before_with_other_columns_is_rewritten_once_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    # a first row of a validation gave the header another order; `lr` is no column any more
    path.write_text("step,val_loss,lr,loss\n0,6.0,,\n1,,0.5,4.0\n2,,0.5,3.0\n", encoding="utf-8")
    log = CsvLog(path, ["step", "loss", "mfu", "val_loss"])
    log.keep(2)
    assert (log.n_rows, log.columns) == (2, ["step", "loss", "mfu", "val_loss", "lr"])
    log.write({"step": 2, "loss": 2.5, "mfu": 0.1})
    assert lines(log) == ["step,loss,mfu,val_loss,lr", "0,,,6.0,", "1,4.0,,,0.5", "2,2.5,0.1,,"]


@pytest.mark.parametrize("is_cut", [False, True], ids=["resumed", "cut"])
def test_a_long_log_is_not_read_into_memory(tmp_path: Path, is_cut: bool) -> None:
    log = CsvLog(tmp_path / "stories.csv", ["step", "text"])
    for step in range(100):
        log.write(*({"step": step, "text": "once\n" * 50} for _ in range(100)))
    size = log.path.stat().st_size
    tracemalloc.start()
    if is_cut:
        os.truncate(log.path, size - 7)
        log.write({"step": 100})
    else:
        log = CsvLog(log.path, log.columns)
        log.keep(9_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 2_500_000 and peak < 250_000
    assert log.n_rows == (10_000 if is_cut else 9_000)
    with log.path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == log.n_rows and rows[8_999] == {"step": "89", "text": "once\n" * 50}


def test_what_a_kill_left_beside_a_log_goes_with_the_next_run(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv", ["step", "loss"])
    (tmp_path / "metrics.77.tmp").touch()
    log.keep(0)
    assert list(tmp_path.iterdir()) == []


def test_a_torn_last_row_is_dropped_or_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,loss\r\n1,3.0\r\n2,2\xff\0\0\0")
    log = CsvLog(path, ["step", "loss"])
    log.keep(1)
    assert lines(log) == ["step,loss", "1,3.0"]


@contextmanager
def locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let opening the file fail, as on Windows while a spreadsheet has it open."""

    def refuse(*_: object) -> int:
        raise PermissionError(13, "it is in use", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(csv_log, "open_no_link", refuse)
        yield


def test_rows_wait_while_another_program_has_the_file_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CsvLog(tmp_path / "metrics.csv", ["step"])
    log.write({"step": 1})
    with locked(log.path, monkeypatch):
        log.write({"step": 2})
        log.write({"step": 3})
    assert lines(log) == ["step", "1"] and log.n_rows == 3
    log.write({"step": 4})
    assert lines(log) == ["step", "1", "2", "3", "4"]


def test_rows_wait_while_the_disk_is_full_and_the_log_goes_on_with_its_header(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, later = (CsvLog(small_disk / name, ["step", "text"]) for name in ("first.csv", "later.csv"))
    log.write({"step": 1, "text": "x"})
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while True:
            assert file.write(b"\0" * 4096)
    long = "y" * 10_000
    for step in (2, 3):
        log.write({"step": step, "text": long})
    later.write({"step": 3, "text": long})
    log.sync()
    told = capsys.readouterr().err
    assert told.count("cannot be written") == 2 and "No space left on device" in told
    assert "first.csv" in told and "later.csv" in told and told.count("training goes on, its rows wait") == 2
    # of a row that did not fit nothing is left
    assert lines(log) == ["step,text", "1,x"]
    filler.unlink()
    log.write({"step": 4, "text": "z"})
    later.sync()
    assert lines(log) == ["step,text", "1,x", f"2,{long}", f"3,{long}", "4,z"] and log.n_rows == 4
    assert lines(later) == ["step,text", f"3,{long}"]


def test_a_log_that_was_deleted_begins_again_with_its_header(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "logs/metrics.csv", ["step"])
    log.write({"step": 1})
    log.path.unlink()
    log.write({"step": 2})
    assert lines(log) == ["step", "2"]
    (tmp_path / "logs").rename(tmp_path / "moved")
    log.write({"step": 3})
    assert lines(log) == ["step", "3"]


def test_a_log_that_something_else_cuts_is_told_at_the_next_row_and_counted_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = CsvLog(tmp_path / "metrics.csv", ["step", "loss"])
    for step in range(1, 6):
        log.write({"step": step, "loss": 3.25})
    os.truncate(log.path, len("step,loss\r\n1,3.25\r\n2,3.25\r\n3,3"))
    log.write({"step": 6, "loss": 3.0})
    told = f"Warning: {log.path} was cut by something else, and 3 of its rows are lost\n"
    assert capsys.readouterr().err == told
    log.write({"step": 7, "loss": 2.0})
    assert lines(log) == ["step,loss", "1,3.25", "2,3.25", "6,3.0", "7,2.0"] and log.n_rows == 4
    # the checkpoint of now counts four: a resume keeps them, and warns of nothing
    log.write({"step": 8, "loss": 1.0})
    again = CsvLog(log.path, ["step", "loss"])
    again.keep(4)
    assert lines(again)[-1] == "7,2.0" and capsys.readouterr().err == ""


def test_a_folder_in_the_place_of_a_log_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = CsvLog(tmp_path / "metrics.csv", ["step"])
    log.path.mkdir()
    for step in (1, 2):
        log.write({"step": step})
        log.sync()
    assert capsys.readouterr().err.count("cannot be written") == 1
    log.path.rmdir()
    log.write({"step": 3})
    assert lines(log) == ["step", "1", "2", "3"]


def test_only_the_first_process_writes_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CsvLog(tmp_path / "spikes.csv", ["step"])
    log.write({"step": 1})
    before = log.path.read_bytes()
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = CsvLog(log.path, ["step"])
    other.keep(0)
    other.write({"step": 2})
    assert log.path.read_bytes() == before


def test_the_logs_of_a_run_go_on_behind_the_rows_that_a_checkpoint_counts(tmp_path: Path) -> None:
    logs = RunLogs(tmp_path, MoEConfig(**TINY_CONFIG))
    logs.write_loads(1, [0, 1], [[4.0, 3.0, 2.0, 1.0, *[0.5] * 4], [1.0, 2.0, 3.0, 4.0, *[0.5] * 4]])
    logs.stories.write({"step": 1, "tokens": 256, "prompt": "a", "text": "a, b"})
    at_checkpoint = logs.lengths()
    assert at_checkpoint == {"n_rows": 0, "n_spikes": 0, "n_loads": 2, "n_stories": 1}
    assert lines(logs.loads) == ["step,layer,e0,e1,e2,e3", "1,0,4,3,2,1", "1,1,1,2,3,4"]
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    logs.stories.write({"step": 2, "tokens": 512, "prompt": "a", "text": "torn"})
    again = RunLogs(tmp_path, MoEConfig(**TINY_CONFIG))
    again.keep(at_checkpoint)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    assert again.lengths() == at_checkpoint


@pytest.mark.parametrize("is_emptied", [False, True], ids=["deleted", "emptied"])
def test_a_log_that_is_deleted_or_emptied_begins_anew_says_so_and_counts_what_it_has(
    is_emptied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = CsvLog(tmp_path / "logs/metrics.csv", ["step", "loss"])
    for step in (1, 2, 3):
        log.write({"step": step})
    if is_emptied:
        os.truncate(log.path, 0)
    else:
        shutil.rmtree(log.path.parent)
    log.write({"step": 4})
    assert lines(log) == ["step,loss", "4,"] and log.n_rows == 1
    assert "metrics.csv is gone, with 3 rows; it begins anew" in capsys.readouterr().err
    log.write({"step": 5})
    assert lines(log)[1:] == ["4,", "5,"] and capsys.readouterr().err == ""


@pytest.mark.parametrize("folder", ["logs/csv", "logs"])
def test_no_row_is_written_through_a_folder_that_became_a_link(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = CsvLog(tmp_path / "logs/csv/metrics.csv", ["step"])
    log.write({"step": 1})
    (tmp_path / folder).rename(tmp_path / "moved")
    (tmp_path / folder).symlink_to(tmp_path / "moved")
    before = log.path.read_bytes()
    log.write({"step": 2})
    assert log.path.read_bytes() == before
    assert "cannot be written (its folder has become a link)" in capsys.readouterr().err
    (tmp_path / folder).unlink()
    (tmp_path / "moved").rename(tmp_path / folder)
    log.write({"step": 3})
    assert lines(log) == ["step", "1", "2", "3"]


def test_a_log_that_is_emptied_begins_anew_with_its_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = CsvLog(tmp_path / "metrics.csv", ["step", "loss"])
    for step in (1, 2, 3):
        log.write({"step": step})
    # as `: > metrics.csv` and logrotate's copytruncate do
    log.path.write_bytes(b"")
    log.write({"step": 4})
    assert lines(log) == ["step,loss", "4,"] and log.n_rows == 1
    assert "metrics.csv is gone, with 3 rows; it begins anew" in capsys.readouterr().err


@pytest.mark.parametrize("left", [b"", b"step,loss\r\n1,3.0\r\n"])
def test_a_resume_says_that_rows_of_its_checkpoint_are_missing(
    left: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = CsvLog(tmp_path / "metrics.csv", ["step", "loss"])
    log.path.write_bytes(left)
    log.keep(3)
    assert f"metrics.csv has {log.n_rows} of the 3 rows that the checkpoint counts" in capsys.readouterr().err
    log.keep(log.n_rows)
    assert capsys.readouterr().err == "" and lines(log)[0] == "step,loss"


def test_a_log_without_a_header_is_put_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # what earlier versions wrote into a log that had been emptied
    log = CsvLog(tmp_path / "metrics.csv", ["step", "loss"])
    log.path.write_bytes(b"4,2.0\r\n5,1.5\r\n")
    log.keep(5)
    assert lines(log) == ["step,loss"] and (log.columns, log.n_rows) == (["step", "loss"], 0)
    assert (tmp_path / "metrics.csv.1").read_bytes() == b"4,2.0\r\n5,1.5\r\n"
    told = capsys.readouterr().err
    assert "metrics.csv has no header; it is now metrics.csv.1" in told


@pytest.mark.parametrize("head", ["step,loss", '"' + "x" * 200_000])
def test_a_damaged_log_is_put_aside(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = CsvLog(tmp_path / "metrics.csv", ["step", "loss"])
    # an open quote: all that follows is one value, longer than the csv module reads
    log.path.write_text(f'{head}\n1,3.0\n2,"{"0" * 200_000}\n3,2.0\n', encoding="utf-8")
    # one for the whole process, which reading somebody's data raises
    earlier = csv.field_size_limit(131_072)
    try:
        log.keep(3)
    finally:
        csv.field_size_limit(earlier)
    assert lines(log) == ["step,loss"] and (log.columns, log.n_rows) == (["step", "loss"], 0)
    told = capsys.readouterr().err
    assert "metrics.csv is damaged (field larger than field limit (131072)); it is now metrics.csv.1" in told


def test_rows_that_were_never_written_are_told_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = RunLogs(tmp_path / "logs", MoEConfig(**TINY_CONFIG))
    logs.metrics.write({"step": 1})
    (tmp_path / "logs").rename(tmp_path / "moved")
    (tmp_path / "logs").symlink_to(tmp_path / "moved")
    for step in (2, 3):
        logs.metrics.write({"step": step})
    logs.sync()
    assert "are lost" not in capsys.readouterr().err
    logs.close()
    told = capsys.readouterr().err
    assert (
        "metrics.csv could not be written to the end (its folder has become a link): 2 rows are lost" in told
    )
    assert told.count("are lost") == 1
