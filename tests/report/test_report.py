"""tools/report.py on the logs of a real tiny run, and in a real browser where there is Chromium."""

import base64
import csv
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY_CONFIG
from helpers.browser import PROGRAM, Browser

from litgpt_moe.report.page import MAX_POINTS
from litgpt_moe.report.read import read_facts
from tools import report

STORY = '</script><script>document.title = "hurt"</script><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_tokenizer_dir: Path, run_script: Callable
) -> Path:
    """The out_dir of a run of eight steps, trained in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    data = {name: str(tiny_data / name.split("_")[0]) for name in ("train_data_path", "val_data_path")}
    settings = {
        "out_dir": "first",
        "accelerator": "cpu",
        "precision": "32-true",
        "compile": "off",
        "tokenizer_dir": str(tiny_tokenizer_dir),
        "data": {"class_path": "prepare_data.TextShards", "init_args": data},
        "train": {"global_batch_size": 4, "micro_batch_size": 4, "max_tokens": 8 * 4 * 64, "log_interval": 1},
        "eval": {"interval": 4, "max_iters": 2, "max_new_tokens": 8},
    }
    (folder / "model_config.yaml").write_text(yaml.dump(TINY_CONFIG), encoding="utf-8")
    (folder / "train_config.yaml").write_text(yaml.dump(settings), encoding="utf-8")
    done = run_script("run_train.py", "--config", "train_config.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "first"


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "first", ignore=shutil.ignore_patterns("*.pth")))


def page_of(path: Path) -> dict[str, Any]:
    """Return what the page's script draws."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])


def make(*args: object, out: Path) -> list[dict[str, Any]]:
    assert report.main([*map(str, args), "--out", str(out)]) == 0
    return page_of(out)["runs"]


def logged(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "logs/csv/metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_log(folder: Path, text: str) -> Path:
    (folder / "logs/csv").mkdir(parents=True)
    (folder / "logs/csv/metrics.csv").write_text(text, encoding="utf-8")
    return folder


def test_the_page_holds_what_the_run_logged(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = make(run_dir, out=tmp_path / "report.html")
    rows = logged(run_dir)
    train, val = ([row for row in rows if row[name]] for name in ("loss", "val_loss"))
    assert len(train) == 8 and len(val) >= 2
    for column, short in {"loss": "loss", "learning_rate": "lr", "total_tokens": "tokens"}.items():
        assert run["train"][short] == pytest.approx([float(row[column]) for row in train], rel=1e-5)
    assert run["val"]["loss"] == pytest.approx([float(row["val_loss"]) for row in val], rel=1e-5)
    worst = [max(float(row[f"moe/load_imbalance/layer_0{i}"]) for i in range(2)) for row in train]
    assert run["train"]["imbalance"] == pytest.approx(worst, rel=1e-5)
    assert [story["step"] for story in run["stories"]] == ["4", "8"]
    assert run["settings"]["train.global_batch_size"] == "4" and run["settings"]["model.n_expert"] == "4"
    assert run["command"] == "run_train.py --config train_config.yaml" and run["done"]
    about = run["about"]
    assert about["Model"] == "MoE-tiny: 2 layers of width 16, 4 experts, 2 for each token"
    assert about["Parameters"].endswith(" active for each token")
    assert "cores, " in about["Machine"] and "a tokenizer of " in about["Data"]
    n_tokens = json.loads((run_dir / "logs/run.json").read_text("utf-8"))["data"]["train"]["n_tokens"]
    assert about["Passes"] == f"{8 * 4 * 64 / n_tokens:.3g} through the training data"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("report.html") and "file://" in lines[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"first", "report.html"}


def test_the_heat_map_is_the_logged_load_over_the_even_one(run_dir: Path, tmp_path: Path) -> None:
    (run,) = make(run_dir, out=tmp_path / "report.html")
    heat = run["heat"]
    codes = base64.b64decode(heat["codes"])
    assert heat["layers"] == [0, 1] and heat["n_expert"] == 4 and heat["steps"] == list(range(1, 9))
    with (run_dir / "logs/expert_load.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            loads = [int(row[f"e{e}"]) for e in range(4)]
            first = (int(row["layer"]) * 8 + int(row["step"]) - 1) * 4
            for load, code in zip(loads, codes[first : first + 4], strict=True):
                # a 32nd of an octave is 2.2 %
                ratio = 2 ** ((code - 128) / 32) if code else 0
                assert ratio == pytest.approx(4 * load / sum(loads), rel=0.012)


def test_a_run_that_goes_on_has_a_torn_last_line(run_dir: Path, tmp_path: Path) -> None:
    shutil.rmtree(run_dir / "final")
    log = run_dir / "logs/csv/metrics.csv"
    whole = log.read_bytes()
    last = whole.rstrip().rindex(b"\n") + 1
    (before,) = make(run_dir, out=tmp_path / "before.html")
    log.write_bytes(whole + whole[last : last + 30])
    (after,) = make(run_dir, out=tmp_path / "after.html")
    assert after["train"] == before["train"] and after["val"] == before["val"] and not after["done"]


def test_an_old_run_lacks_columns_and_files(tmp_path: Path) -> None:
    old = write_log(tmp_path / "old", "step,loss,val_loss\n10,3.5,\n20,2.5,\n20,,2.75\n")
    (run,) = make(old, out=tmp_path / "report.html")
    assert run["train"] == {"step": [10, 20], "loss": [3.5, 2.5]}
    assert run["val"] == {"step": [20], "loss": [2.75]}
    assert run["heat"] is None and run["stories"] == [] and run["settings"] == {}


def result(path: object, sha256: str = "0", **changes: object) -> str:
    """A line of results.jsonl as evaluate.py writes it."""
    checkpoint = {"path": str(path), "step": 8, "sha256": sha256}
    row = {"checkpoint": checkpoint, "data": {"data_dir": "d", "split": "val"}, "time": "2026-01-01T00:00:00"}
    figures = {"loss": 1.5, "loss_stderr": None, "perplexity": 4.5, "bits_per_byte": 0.5, "n_tokens": 99}
    return json.dumps({**row, **figures, **changes}) + "\n"


def test_evaluations_of_a_run_are_found_by_digest_and_by_path(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "step-00000004").mkdir(exist_ok=True)
    (run_dir / "step-00000004/checkpoint.json").unlink(missing_ok=True)  # as LitGPT's own have none
    record = json.loads((run_dir / "final/checkpoint.json").read_text(encoding="utf-8"))
    moved = result("/gone/final", record["files"]["lit_model.pth"]["sha256"], loss=1.25)
    lines = [moved, moved, result(run_dir / "step-00000004"), result("/gone/other"), "{", "null\n"]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(lines), encoding="utf-8")
    (run_dir / "results.jsonl").write_text(moved + result(run_dir / "final", loss=2.5), encoding="utf-8")
    (run,) = make(run_dir, "--results_file", results, out=tmp_path / "report.html")
    assert sorted((row["checkpoint"], row["loss"]) for row in run["results"]) == [
        ("final", 1.25),
        ("final (replaced since)", 2.5),
        ("step-00000004", 1.5),
    ]
    assert {row["data"] for row in run["results"]} == {"d val"}
    newest = run["results"][-1]
    assert run["about"]["Evaluation"].startswith(
        f"{newest['checkpoint']} on d val: loss {newest['loss']:.4f}, "
    )


@pytest.mark.parametrize(
    "line",
    [
        "[" * 99_999,
        result("x" * 10**6),
        result("final", time=1),
        result("final", data=[]),
        result("/a\0b/c"),
        json.dumps({"checkpoint": None}) + "\n",
    ],
)
def test_results_of_another_shape_are_left_out(line: str, run_dir: Path, tmp_path: Path) -> None:
    good = result(run_dir / "final", loss=float("inf"), perplexity="7", n_tokens=10**400)
    (run_dir / "results.jsonl").write_text(line + "\n" + good, encoding="utf-8")
    (run,) = make(run_dir, out=tmp_path / "report.html")
    (row,) = run["results"]
    assert row["loss"] is row["perplexity"] is row["n_tokens"] is None and row["bits_per_byte"] == 0.5


def test_two_runs_of_one_name_are_told_apart(run_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "b" / "first"))
    runs = make(run_dir, other, run_dir, out=tmp_path / "report.html")
    assert [run["name"] for run in runs] == [str(run_dir), str(other)]
    (run,) = make(run_dir / "final", out=tmp_path / "report.html")
    assert run["name"] == "first"


def test_a_long_log_makes_a_small_page_that_keeps_the_extremes(tmp_path: Path) -> None:
    lines = [f"{i},{i * 64},{2 + (i == 777) * 5}.0,{0.5 if i % 2 else 'nan'}\n" for i in range(1, 20_001)]
    run_dir = write_log(tmp_path / "long", "step,total_tokens,loss,grad_norm\n" + "".join(lines))
    (run,) = make(run_dir, out=tmp_path / "report.html")
    train = run["train"]
    assert len(train["loss"]) == MAX_POINTS and (tmp_path / "report.html").stat().st_size < 200_000
    assert max(train["loss_high"]) == 7 and train["step"][-1] == 20_000 and set(train["norm"]) == {0.5}


def test_facts_of_another_shape_are_left_out(tmp_path: Path) -> None:
    odd = write_log(tmp_path / "odd", "step,loss\n10,3.5\n")
    facts = {"settings": ["seed", 1], "versions": "2.10", "command": 7, "model": {"name": 5}, "machine": []}
    facts |= {"data": {"class_path": 1}, "commit": {"id": None, "is_changed": True}}
    (odd / "logs/run.json").write_text(json.dumps(facts), encoding="utf-8")
    load = f"step,layer,e0,e1\n10,0,3,{'9' * 30}\n20,0,1,3\n"
    (odd / "logs/expert_load.csv").write_text(load, encoding="utf-8")
    (odd / "final").mkdir()
    (odd / "final/model_config.yaml").write_text("a: &b [1]\nc: *b\n", encoding="utf-8")
    (run,) = make(odd, out=tmp_path / "report.html")
    assert (run["settings"], run["versions"], run["command"], run["about"]) == ({}, {}, "", {})
    assert run["heat"]["steps"] == [20] and run["train"]["loss"] == [3.5]


@pytest.mark.parametrize(
    "text", ["[1]", "null", "7", '"x"', "{", '{"settings": ' * 900 + "1" + "}" * 900, '{"a": ' * 99_999]
)
def test_facts_that_cannot_be_read_are_left_out_with_a_note(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = write_log(tmp_path / "odd", "step,loss\n10,3.5\n")
    (odd / "logs/run.json").write_text(text, encoding="utf-8")
    (run,) = make(odd, out=tmp_path / "report.html")
    assert run["command"] == "" and run["train"]["loss"] == [3.5]
    assert "900" in text or text.startswith('{"settings"') or "run.json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["train: [{2020-01-01: 1}]\n", 'train: "\\ud800"\n', "train: !!set {x}\n"])
def test_settings_of_any_type_are_shown(text: str, tmp_path: Path) -> None:
    odd = write_log(tmp_path / "odd", "step,loss\n10,3.5\n")
    (odd / "final").mkdir()
    (odd / "final/train_config.yaml").write_text(text, encoding="utf-8")
    (run,) = make(odd, out=tmp_path / "report.html")
    assert any(key.startswith("train") for key in run["settings"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_run_whose_name_is_not_utf8_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = write_log(tmp_path / os.fsdecode(b"caf\xe9"), "step,loss\n10,3.5\n")
    (run,) = make(odd, out=tmp_path / "report.html")
    assert run["name"] == "caf?" and r"shows caf\udce9" in capsys.readouterr().out


def test_what_cannot_be_shown_is_said_in_a_sentence(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = write_log(tmp_path / "empty", "")
    fresh = write_log(tmp_path / "fresh", "step,loss\n")
    begun = tmp_path / "begun"
    (begun / "logs").mkdir(parents=True)
    (begun / "logs/run.json").write_text("{}", encoding="utf-8")
    mine = tmp_path / "mine.html"
    mine.write_text("my own page", encoding="utf-8")
    out = tmp_path / "report.html"
    for args, message in [
        ([tmp_path / "none", "--out", out], "none: no such folder; name the out_dir of a run"),
        ([run_dir / "none", "--out", out], "none: no such folder; name the out_dir of a run"),
        ([run_dir.parent, "--out", out], "no logs/csv/metrics.csv in it; name the out_dir of a run"),
        ([begun, "--out", out], "no logs/csv/metrics.csv in it; wait for the run's first row"),
        ([empty, "--out", out], "has no row yet; wait for the run's first one (train.log_interval)"),
        ([fresh, "--out", out], "has no row yet; wait for the run's first one (train.log_interval)"),
        ([run_dir, "--out", tmp_path], "is a folder; name a file"),
        ([run_dir, "--out", mine], "mine.html exists and is no report; add --overwrite or name another"),
        ([run_dir, "--out", mine / "report.html"], "mine.html"),
    ]:
        assert report.main([*map(str, args)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert mine.read_text(encoding="utf-8") == "my own page" and not out.exists()
    assert report.main([str(run_dir), "--out", str(mine), "--overwrite"]) == 0


def test_overwrite_replaces_pages_alone(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "lit_model.pth"
    weights.write_bytes(b"PK\x03\x04 weights")
    (tmp_path / "pipe.html").symlink_to(tmp_path / "nowhere")
    for out, reason in (
        (weights, "exists and is no earlier result; name another file"),
        (tmp_path / "pipe.html", "is no ordinary file; name another"),
    ):
        assert report.main([str(run_dir), "--out", str(out), "--overwrite"]) == 2
        assert f"error: {out} {reason}" in capsys.readouterr().err
    assert weights.read_bytes() == b"PK\x03\x04 weights" and (tmp_path / "pipe.html").is_symlink()
    page = tmp_path / "page"
    assert report.main([str(run_dir), "--out", str(page)]) == 0
    assert report.main([str(run_dir), "--out", str(page)]) == 0


# --- in a browser -------------------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(PROGRAM is None or os.name != "posix", reason="no Chromium here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def show(browser: Browser, page: Path, width: int = 1280, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser("Emulation.setDeviceMetricsOverride", **size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser("Emulation.setEmulatedMedia", features=[feature])
    browser.problems.clear()
    browser("Page.navigate", url=page.as_uri())
    browser.wait("document.readyState === 'complete' && typeof paintAll === 'function'")


@pytest.fixture
def two_runs(run_dir: Path, tmp_path: Path) -> Path:
    """The page of the run and of a copy with hostile names and story, another setting, a spike, a result."""
    other = Path(shutil.copytree(run_dir, tmp_path / "<img src=x>"))
    facts = json.loads((other / "logs/run.json").read_text(encoding="utf-8"))
    facts["settings"]["seed"] = 43
    (other / "logs/run.json").write_text(json.dumps(facts), encoding="utf-8")
    with (other / "logs/stories.csv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow([8, 2048, "Once", STORY])
    spike = "step,loss,mean,sigma,grad_norm,first_sequence\n5,6.5,5.5,0.1,3.0,16\n"
    (other / "logs/spikes.csv").write_text(spike, encoding="utf-8")
    row = result(other / "final", data={"data_dir": STORY}, blimp={"accuracy": 0.625})
    (other / "results.jsonl").write_text(row, encoding="utf-8")
    make(run_dir, other, out=tmp_path / "report.html")
    return tmp_path / "report.html"


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_in_both_schemes(
    width: int, scheme: str, browser: Browser, two_runs: Path
) -> None:
    show(browser, two_runs, width, scheme)
    assert browser.js("document.documentElement.scrollWidth === document.documentElement.clientWidth")
    drawn = "[...document.querySelectorAll('.chart:not([hidden]) h2')].map((e) => e.textContent)"
    assert browser.js(drawn)[:4] == ["Loss", "Learning rate", "Gradient norm", "Tokens per second"]
    assert browser.js("document.querySelectorAll('canvas').length") == 4  # two runs of two layers
    page = "getComputedStyle(document.documentElement).backgroundColor"
    assert browser.js(page) == ("rgb(246, 246, 243)" if scheme == "light" else "rgb(20, 22, 26)")
    picture = base64.b64decode(browser("Page.captureScreenshot", format="png")["data"])
    assert picture.startswith(b"\x89PNG") and browser.problems == []


@in_browser
@pytest.mark.parametrize("width", [1280, 1000, 390])
def test_every_column_of_every_table_is_in_the_window(width: int, browser: Browser, two_runs: Path) -> None:
    show(browser, two_runs, width)
    browser.js("$('all').open = true")
    outside = """[...document.querySelectorAll("td")].filter((e) => {
      const {left, right, width} = e.getBoundingClientRect();
      return width && (left < 0 || right > document.documentElement.clientWidth);
    }).map((e) => e.textContent)"""
    assert browser.js("document.querySelectorAll('td').length") > 50 and browser.js(outside) == []
    if width == 390:  # the labels stand in the cells, since the head of the table is out of sight
        label = "getComputedStyle(document.querySelector('#results td:nth-child(5)'), '::before').content"
        assert browser.js(label) == '"Loss"'


@in_browser
def test_the_page_says_what_each_run_was(browser: Browser, two_runs: Path) -> None:
    show(browser, two_runs)
    rows = browser.js("[...$('about').rows].map((row) => [...row.cells].map((cell) => cell.textContent))")
    assert rows[0] == ["", "first", "<img src=x>"]
    assert [row[0] for row in rows[1:6]] == ["Model", "Parameters", "Machine", "Data", "Passes"]
    assert rows[1][1] == rows[1][2] == "MoE-tiny: 2 layers of width 16, 4 experts, 2 for each token"


@in_browser
def test_names_and_stories_are_text_and_no_html(browser: Browser, two_runs: Path) -> None:
    show(browser, two_runs)
    assert browser.js("document.images.length") == 0 and browser.problems == []
    assert browser.js("document.querySelectorAll('.columns > div')[1].textContent").count(STORY) == 1
    assert browser.js("document.title") == "first, <img src=x>: training report"
    cells = browser.js("[...document.querySelectorAll('#results td')].map((e) => e.textContent)")
    loss = ["1.5000", "4.5", "0.5000", "2026-01-01 00:00"]
    assert cells == ["<img src=x>", "final (replaced since)", f"{STORY} None", "99", *loss]
    cells = browser.js("[...document.querySelectorAll('#quality td')].map((e) => e.textContent)")
    assert cells == ["<img src=x>", "final (replaced since)", "62.5%", "2026-01-01 00:00"]


@in_browser
def test_hover_tells_the_logged_values_on_every_axis(browser: Browser, two_runs: Path, run_dir: Path) -> None:
    show(browser, two_runs)
    row, val = ([row for row in logged(run_dir) if row[name]][-1] for name in ("loss", "val_loss"))
    axes = browser.js("[...document.querySelectorAll('#axes button')].map((e) => e.dataset.axis)")
    assert axes == ["tokens", "time", "flops", "step"]
    for axis in axes:
        browser.js(f"document.querySelector('[data-axis={axis}]').click()")
        box = browser.js(
            "(() => { const r = document.querySelector('.chart svg').getBoundingClientRect();"
            "return {x: r.right - 9, y: r.top + r.height / 2}; })()"
        )
        browser("Input.dispatchMouseEvent", type="mouseMoved", **box)
        told = browser.js("$('tip').hidden ? '' : $('tip').textContent")
        assert told.count(f"training {float(row['loss']):.3f}") == 2
        assert told.count(f"validation {float(val['val_loss']):.3f}") == 2
    assert "Steps: 8" in told


LABELS = """
[...document.querySelectorAll(".map svg")].map((svg) => [...svg.querySelectorAll("text")].map((e) => {
  const {left, right, top, bottom} = e.getBoundingClientRect();
  return {text: e.textContent, left, right, top, bottom};
}))
"""
OVERLAPS = """
[...document.querySelectorAll("svg text")]
  .map((e) => ({at: e.getBoundingClientRect(), svg: e.closest("svg")}))
  .filter(({at}) => at.width)
  .filter(({at, svg}, i, all) => all.some((other, j) => j > i && other.svg === svg
    && at.left < other.at.right && other.at.left < at.right
    && at.top < other.at.bottom - 3 && other.at.top < at.bottom - 3)).length
"""


@in_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_heat_map_says_which_expert_and_over_what(width: int, browser: Browser, two_runs: Path) -> None:
    show(browser, two_runs, width)
    for axis, name in {"time": "time", "flops": "FLOPs", "step": "steps", "tokens": "tokens"}.items():
        browser.js(f"document.querySelector('[data-axis={axis}]').click()")
        maps = browser.js(LABELS)
        assert [len(labels) > 7 and labels[-1]["text"] for labels in maps] == [name] * 4
        assert [label["text"] for label in maps[0][:6]] == [
            *"0123",
            "expert",
            "0 s" if axis == "time" else "0",
        ]
    assert [label["text"] for label in maps[0][6:]] == ["1k", "2k", "tokens"]
    box = browser.js("document.querySelector('canvas').getBoundingClientRect().toJSON()")
    for e, label in enumerate(maps[0][:4]):  # at the height of its row, left of it
        middle = box["top"] + (e + 0.5) * box["height"] / 4
        assert abs((label["top"] + label["bottom"]) / 2 - middle) < 3 and label["right"] < box["left"]
    end = maps[0][-2]  # 2k of 2,048 tokens
    assert box["top"] + box["height"] <= end["top"] and end["right"] <= box["right"] + 1
    assert browser.js(OVERLAPS) == 0


@in_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_labels_of_many_experts_and_any_time_do_not_touch(
    width: int, browser: Browser, tmp_path: Path
) -> None:
    for n_expert, seconds in ((2, 8), (6, 73), (16, 292), (64, 5_000), (128, 700_000)):
        rows = [f"{i},{i * 64},{seconds * i / 9},{9 - i},0.1,1.0" for i in range(1, 10)]
        header = "step,total_tokens,time_s,loss,learning_rate,grad_norm"
        run_dir = write_log(tmp_path / str(n_expert), "\n".join([header, *rows, ""]))
        loads = [",".join(map(str, (i, 3, *range(n_expert)))) for i in range(1, 10)]
        names = ",".join(f"e{e}" for e in range(n_expert))
        text = "\n".join([f"step,layer,{names}", *loads, ""])
        (run_dir / "logs/expert_load.csv").write_text(text, encoding="utf-8")
        make(run_dir, out=tmp_path / "report.html")
        show(browser, tmp_path / "report.html", width)
        for axis in ("tokens", "time"):
            browser.js(f"document.querySelector('[data-axis={axis}]').click()")
            assert browser.js(OVERLAPS) == 0, (n_expert, axis)
            (labels,) = browser.js(LABELS)
            at = [label["text"] for label in labels].index("expert")
            assert at >= 2 and len(labels) - at >= 4  # two experts, two places on the other axis


@in_browser
def test_a_run_before_its_first_validation_is_drawn_whole(browser: Browser, tmp_path: Path) -> None:
    new = "step,loss,val_loss,learning_rate,remaining_time\n10,3.5,,0.1,90\n"
    make(write_log(tmp_path / "new", new), out=tmp_path / "report.html")
    show(browser, tmp_path / "report.html", 390)
    assert browser.problems == []
    drawn = "[...document.querySelectorAll('.chart:not([hidden]) h2')].map((e) => e.textContent)"
    assert browser.js(drawn) == ["Loss", "Learning rate"]
    assert browser.js("document.querySelectorAll('.chart .dot').length") == 2  # a line needs two rows
    assert browser.js("$('tiles').textContent").endswith("State1 min 30 s to go")


@in_browser
def test_a_run_can_be_hidden_and_only_differences_are_listed(browser: Browser, two_runs: Path) -> None:
    show(browser, two_runs)
    curves = "document.querySelectorAll('.chart')[1].querySelectorAll('.curve').length"
    assert browser.js(curves) == 2
    browser.click("document.querySelectorAll('.run')[1]")
    assert browser.js(curves) == 1
    rows = "[...document.querySelectorAll('#all tr:not([hidden]) td:first-child')].map((e) => e.textContent)"
    assert browser.js(rows) == ["seed"]
    browser.click("$('only')")
    assert "optimizer.class_path" in browser.js(rows)
    assert browser.js("document.querySelectorAll('.spike').length") == 0  # the hidden run's
    assert browser.js("$('spikes').querySelectorAll('tr').length") == 2


@in_browser
@pytest.mark.slow
def test_the_pictures_of_the_front_page_can_be_made(trained: Path, browser: Browser, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "checkpoints")
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs/make_pictures.py")
    assert spec and spec.loader
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.make_pictures(tmp_path, browser, tmp_path)
    browser("Emulation.setScrollbarsHidden", hidden=False)
    for name in ("report.webp", "playground.webp"):
        picture = (tmp_path / name).read_bytes()
        assert picture[8:12] == b"WEBP" and 1000 < len(picture) <= pictures.MAX_BYTES


def test_a_report_takes_its_settings_from_the_newest_step_not_from_a_folder_with_another_name(
    tmp_path: Path,
) -> None:
    for name, seed in (("step-00000900", 1), ("step-100000000", 2), ("step-best", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_config.yaml").write_text(f"seed: {seed}\n", encoding="utf-8")
    settings, _, _ = read_facts(tmp_path, {})
    assert settings["seed"] == "2"


def test_scores_beside_the_loss_are_shown_as_far_as_they_are_numbers(run_dir: Path, tmp_path: Path) -> None:
    told = {"n": 48, "ended": 0.75, "distinct_3": None, "copied_longest": 9, "copied": [9] * 48, "words": "x"}
    judged = {**told, "judge": {"grammar": 7.5, "plot": "<b>", "model": "j", "failure": "x"}}
    path = run_dir / "final"
    rows = [
        result(path, loss=None, data={}, blimp={"accuracy": 0.625, "paradigms": {"a": 0.625}}),
        result(path, stories=judged, blimp=[1]),
        result(path, loss=2.0, stories="odd", blimp={"accuracy": float("nan")}),
    ]
    (run_dir / "results.jsonl").write_text("".join(rows), encoding="utf-8")
    (run,) = make(run_dir, out=tmp_path / "report.html")
    assert [row["quality"] for row in run["results"]] == [
        {"blimp": 0.625},
        {"n": 48, "ended": 0.75, "copied_longest": 9, "grammar": 7.5},
        None,
    ]
    assert run["results"][0]["data"] == "none"
