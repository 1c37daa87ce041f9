"""Which rows of the file are a run, what a comparison reads from them, and what it says of them."""

import dataclasses
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from litgpt_moe.comparison.compare import Comparison
from litgpt_moe.comparison.processes import Outcome
from litgpt_moe.comparison.runs import RunsFile, RunSpec
from litgpt_moe.comparison.sweep import Sweep
from litgpt_moe.training.fit import proposed_rate
from tools import compare as tool


def result() -> dict:
    return json.loads(Path("comparison/comparison.json").read_text(encoding="utf-8"))


def put_pair(comparison: Comparison, put: Callable) -> None:
    """Record all runs of two models, of which the first is better."""
    for contestant, loss in zip(comparison.contestants, (3.0, 3.5), strict=True):
        for spec in comparison.specs(contestant):
            put(comparison, spec, loss)


@pytest.fixture
def spec(compare: Callable) -> RunSpec:
    comparison = compare(dense=False, seeds=1)
    return comparison.specs(comparison.contestants[0])[0]


@pytest.mark.parametrize(
    ("changes", "is_found"),
    [
        ({"kind": "sweep"}, False),
        ({"kind": "sweep", "curve": [[i, i, None, 3.0, 1.0] for i in range(4)]}, True),
        ({"kind": "sweep", "failed": "it diverged"}, False),
        ({"kind": "run", "failed": "it diverged"}, True),
        ({"kind": "run", "bits_per_byte": None}, False),
        ({"kind": "run", "curve": None}, False),
        ({"kind": "run", "window": 32}, False),
    ],
)
def test_a_row_stands_for_a_run_if_it_has_all_that_one_has(
    compare: Callable, put: Callable, spec: RunSpec, changes: dict, is_found: bool
) -> None:
    comparison = compare(dense=False, seeds=1)
    put(comparison, spec, 3.0, **changes)
    found = comparison.trainer.standing(spec)
    assert (found is not None) is is_found


def test_a_seed_of_the_data_and_a_precision_of_products_make_another_run(
    compare: Callable, put: Callable, spec: RunSpec
) -> None:
    put(compare(dense=False), spec, 3.0)
    variants = [
        ("order", {"data.init_args.seed": "7"}),
        ("exact", {"float32_matmul_precision": "highest"}),
        # what they are anyway
        ("same", {"data.init_args.seed": "42", "float32_matmul_precision": "high"}),
    ]
    comparison = compare(dense=False, seeds=1, variants=variants)
    stands = [comparison.trainer.standing(comparison.specs(one)[0]) for one in comparison.contestants]
    assert [row is not None for row in stands] == [True, False, False, True]


def test_the_factors_are_those_of_the_seeds_of_the_verdict(compare: Callable, put: Callable) -> None:
    comparison = compare()
    put_pair(comparison, put)
    before = comparison.write()
    # a third run of one model alone, far worse, moves no factor
    put(comparison, RunSpec(comparison.contestants[1], 44, 2048, 0.01), 9.0)
    assert compare(seeds=3).write().splitlines()[-1] == before.splitlines()[-1].replace(
        ": MoE-tiny is better", ": MoE-tiny is better (with 2 of 3 seeds)"
    )


def test_a_model_that_overfits_was_at_its_last_loss_before(compare: Callable, put: Callable) -> None:
    comparison = compare(seeds=1)
    good, bad = (comparison.specs(one)[0] for one in comparison.contestants)
    put(comparison, good, 3.0, curve=[[i, 512 * i, None, 7.0 - i, 1.0] for i in (1, 2, 3, 4)])
    # at 1,024 tokens it was where it is at the end
    losses = {1: 8.0, 2: 5.0, 3: 4.5, 4: 5.0}
    put(comparison, bad, 5.0, curve=[[i, 512 * i, None, losses[i], 1.0] for i in losses])
    comparison.write()
    assert result()["verdicts"][0]["factors"]["tokens"] == pytest.approx(1.0)


def test_runs_of_several_machines_and_commits_are_said_to_be_so(compare: Callable, put: Callable) -> None:
    comparison = compare(seeds=1)
    put_pair(comparison, put)
    assert "These are runs of" not in comparison.write()
    machine = {**comparison.trainer.facts.machine, "cpu": "another"}
    put(
        comparison, compare(seeds=2).specs(comparison.contestants[0])[1], 3.0, machine=machine, commit="other"
    )
    assert "These are runs of 2 machines, 2 commits." in compare(seeds=2).write()
    assert "runs of 2 machines, 2 commits" in Path("comparison/comparison.html").read_text(encoding="utf-8")
    seeds = result()["models"][0]["seeds"]
    assert (seeds["43"]["commit"], seeds["43"]["machine"]["cpu"]) == ("other", "another")


def test_a_pair_with_other_steps_is_said_to_see_other_batches(
    compare: Callable, put: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = [("longer steps", {"train.global_batch_size": "8"})]
    comparison = compare(seeds=1, dense=False, variants=longer)
    assert "Warning: MoE-tiny longer steps and MoE-tiny do not see the same" in capsys.readouterr().err
    put_pair(comparison, put)
    assert "512 in sequences of 64, and 256 in sequences of 64" in comparison.write()
    assert result()["verdicts"][0]["is_same_batches"] is False and len(result()["warnings"]) == 1


def test_a_rate_at_the_edge_of_those_that_were_tried_is_marked(compare: Callable, put: Callable) -> None:
    comparison = compare(seeds=1)
    put_pair(comparison, put)
    names = [one.name for one in comparison.contestants]
    comparison.sweeps = [Sweep(names[0], 512, {0.01: 3.0, 0.02: 4.0}), Sweep(names[1], 512, {0.01: 3.0})]
    comparison.sweeps[1].losses.update({0.005: 4.0, 0.02: 4.0})
    text = comparison.write()
    assert "Warning: MoE-tiny: the best rate, 0.01, is at the edge" in text and text.count("at the edge") == 1
    assert [one["lr_is_at_edge"] for one in result()["models"]] == [True, False]
    assert [one["is_at_edge"] for one in result()["sweeps"]] == [True, False]
    assert "0.01 (at the edge of those tried)" in Path("comparison/comparison.html").read_text(
        encoding="utf-8"
    )


def test_a_model_is_scored_in_windows_as_long_as_its_sequences(compare: Callable) -> None:
    short = [("short", {"train.max_seq_length": "32"})]
    comparison, asked = compare(seeds=1, dense=False, variants=short), []

    def start(command: list[str], *_: object) -> Outcome:
        words = dict(itertools.pairwise(command))
        if "--out_dir" in words:
            (Path(words["--out_dir"]) / "final").mkdir(parents=True)
            return Outcome(0, "", None)
        asked.append(words["--max_seq_length"])
        return Outcome(1, "that is all", None)

    trainer = dataclasses.replace(comparison.trainer, start=start)
    for contestant in comparison.contestants:
        trainer.result(comparison.specs(contestant)[0])
    assert asked == ["64", "32"]


def test_of_two_commands_that_made_the_same_run_the_first_row_counts(
    compare: Callable, put: Callable, spec: RunSpec
) -> None:
    comparison = compare(dense=False, seeds=1)
    first = put(comparison, spec, 3.0)
    identity = spec.identity(comparison.trainer.facts.fingerprint)
    assert comparison.trainer.file.append({**first, "loss": 9.0}, identity) == json.loads(json.dumps(first))
    assert len(list(comparison.trainer.file.rows())) == 1


def test_rows_that_come_at_once_are_one(compare: Callable, put: Callable, spec: RunSpec) -> None:
    comparison = compare(dense=False, seeds=1)
    row = put(comparison, spec, 3.0)
    path, identity = Path("runs.jsonl"), spec.identity(comparison.trainer.facts.fingerprint)
    path.unlink()
    both = threading.Barrier(4)

    def record(n: int) -> None:
        file = RunsFile(path)  # of a command of its own
        both.wait(timeout=30)
        file.append({**row, "loss": float(n)}, identity)

    threads = [threading.Thread(target=record, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1
    assert not list(Path().glob(".runs*"))


@pytest.mark.parametrize("content", ['{"loss": 3.0}\n', "my notes\n", "\x00\x01"])
def test_a_foreign_file_of_results_is_refused_at_once(tmp_path: Path, content: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match="holds something else than finished runs; name another"):
        RunsFile(file).check()
    assert file.read_text() == content


def test_a_place_that_no_row_can_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    RunsFile(tmp_path / "file").check()
    RunsFile(tmp_path / "new/folder/runs.jsonl").check()
    assert not (tmp_path / "new").exists()
    for wrong in (tmp_path, tmp_path / "file/runs.jsonl"):
        with pytest.raises(ValueError, match="name another --results_file"):
            RunsFile(wrong).check()


def test_a_row_that_a_full_disk_cut_off_is_no_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"kind": "run", "na')
    RunsFile(tmp_path / "runs.jsonl").check()


def test_a_tied_matrix_counts_once_and_is_multiplied_all_the_same(compare: Callable) -> None:
    tied = [("tied", {"train.tie_embeddings": "true"})]
    one, other = (each for each in compare(dense=False, variants=tied).contestants)
    embedding = 512 * 16
    assert one.facts.total_params - other.facts.total_params == embedding
    assert one.facts.active_params - other.facts.active_params == embedding
    assert one.facts.flops_per_token == other.facts.flops_per_token
    # the rule is one by the parameters between the embedding and the head
    assert proposed_rate(one.config, one.facts) == proposed_rate(other.config, other.facts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 255}, "--budget comes to 255 tokens for MoE-tiny, less than a step of 256; raise it"),
        ({"budget": None, "budget_of_first": 9}, "--budget_of_first comes to 9 tokens"),
        ({"budget": 5.0, "match": "flops"}, "--budget comes to 0 tokens"),
        ({"rate": None, "sweep_tokens": 200}, "--sweep_tokens .* comes to 200 tokens"),
    ],
)
def test_less_than_a_step_is_refused(compare: Callable, starts: Callable, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compare(**settings)
    assert not starts.commands


@pytest.mark.parametrize(
    ("change", "way_out"),
    [
        ("optimizer.init_args.lr=0.1", "give --lr"),
        ("seed=1", "give --first_seed and --seeds"),
        ("train.max_tokens=1M", "give --budget"),
        ("max_tokens=1M", "give --budget"),
        ("max-tokens=1M", "give --budget"),
        ("train.epochs=2", "give --budget"),
        ("data_dir=other", "give --data_dir"),
        ("initial_checkpoint_dir=old", "starts from weights of its own seed"),
        ("plan=true", "goes on by itself"),
        ("eval.interval=1", "has its own"),
    ],
)
@pytest.mark.parametrize("flag", ["--override", "--variant"])
def test_what_a_comparison_sets_itself_is_refused(
    workspace: Path,
    tiny_data: Path,
    flag: str,
    change: str,
    way_out: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [flag, *(["other"] if flag == "--variant" else []), change]
    usual = ["model_config.yaml", "--config", "train_config.yaml", "--data_dir", str(tiny_data)]
    assert tool.main([*usual, "--budget", "2048", "--results_file", "runs.jsonl", "--plan", *words]) == 2
    said = capsys.readouterr().err
    assert f"{change} would not be taken; " in said and way_out in said and flag in said


def test_a_plan_says_which_runs_stand_and_writes_nothing(
    compare: Callable, put: Callable, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare(out=Path("elsewhere"), seeds=2)
    moe, twin = comparison.contestants
    put(comparison, comparison.specs(moe)[0], 3.0)
    for rate in (0.01, 0.02, 0.04):
        put(comparison, RunSpec(twin, 42, 512, rate, "sweep"), abs(rate - 0.02))
    before = sorted(Path().rglob("*"))
    flags = ["--budget", "2100", "--seeds", "2", "--results_file", "runs.jsonl", "--plan", "--dense"]
    usual = ["model_config.yaml", "--config", "train_config.yaml", "--data_dir", str(tiny_data), *flags]
    assert tool.main([*usual, "--lr", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "  2,048 tokens, 8 steps",
        "  run, seed 42, rate 0.01: stands",
        "  run, seed 43, rate 0.01: to be trained",
    ]
    assert tool.main([*usual, "--sweep_tokens", "512", "--lr_first", "0.01", "--lr_count", "3"]) == 0
    out = capsys.readouterr().out
    assert "  sweep, 512 tokens, seed 42, rate 0.01: to be trained" in out
    assert "  2 runs with the best rate: to be trained, unless they stand" in out
    assert "  sweep, 512 tokens, seed 42, rate 0.04: stands\n  run, seed 42, rate 0.02: to be trained" in out
    assert tool.main([*usual, "--match", "seconds"]) == 0
    assert "follow from their speeds, which are measured first" in capsys.readouterr().out
    assert sorted(Path().rglob("*")) == before


def test_with_keep_a_run_that_stands_has_no_checkpoint(
    compare: Callable, put: Callable, spec: RunSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare(dense=False, seeds=1, keep=True)
    put(comparison, spec, 3.0)
    comparison.run()
    told = "no checkpoint: the run stands in"
    assert told in (err := capsys.readouterr().err) and "--results_file another.jsonl makes it anew" in err


def test_a_short_sweep_is_warned_of(
    compare: Callable, put: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare(dense=False)
    for rate in (0.01, 0.02, 0.04):
        put(comparison, RunSpec(comparison.contestants[0], 42, 512, rate, "sweep"), abs(rate - 0.02))
    compare(dense=False, rate=None, lr_first=0.01, lr_count=3, sweep_tokens=512)
    assert "Warning: MoE-tiny: 2 steps at each rate are few" in capsys.readouterr().err
