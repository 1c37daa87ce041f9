"""The checkpoint that a run continues or starts from: which one, that it fits, and that it is opened once."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import edit_yaml, run, save
from litgpt import GPT

from litgpt_moe.checkpoints.layout import find_checkpoint
from litgpt_moe.config import MoEConfig
from litgpt_moe.folders import staging_for
from litgpt_moe.training.facts import write_run_facts
from litgpt_moe.training.run import Run, set_up

pytestmark = pytest.mark.usefixtures("workspace")
FLAGS = ("--config", "train_config.yaml")
NAMED = ("--model_config", "model_config.yaml")


def set_up_here(*flags: object) -> Run:
    return set_up([*FLAGS, *map(str, flags)])


def refused(*flags: object) -> str:
    with pytest.raises((ValueError, OSError)) as raised:
        set_up_here(*flags)
    return str(raised.value)


def told_paths(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.replace("\\", "/")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The files that torch.load has read."""
    paths: list[Path] = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda path, **options: paths.append(Path(path)) or load(path, **options)
    )
    return paths


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[GPT]:
    """The models that were built, on whatever device."""
    models: list[GPT] = []
    init = GPT.__init__

    def counted(model: GPT, config: MoEConfig) -> None:
        models.append(model)
        init(model, config)

    monkeypatch.setattr(GPT, "__init__", counted)
    return models


def test_a_checkpoint_is_opened_once_and_few_models_are_built(opened: list[Path], built: list[GPT]) -> None:
    save("out/step-00000004", 4)
    opened.clear()
    built.clear()
    run = set_up_here("--resume", "auto")
    assert run.start_step == 4 and run.resume is not None
    assert opened == [Path("out/step-00000004/lit_model.pth")]
    assert len(built) <= 4  # to check both configurations, for the facts, and for the shapes of the weights
    built.clear()
    run.checkpoint_bytes  # noqa: B018
    assert not built
    opened.clear()
    first = set_up_here("--out_dir", "more", "--initial_checkpoint_dir", "out/step-00000004")
    assert first.initial is not None and first.start_step == 0
    assert opened == [Path("out/step-00000004/lit_model.pth")]


def test_what_is_known_of_an_open_checkpoint_stays_known_once_it_is_emptied() -> None:
    save("out/step-00000004", 4)
    resume = set_up_here("--resume", "auto").resume
    assert resume is not None and resume.file == Path("out/step-00000004/lit_model.pth")
    assert resume.weights is resume.state["model"] and resume.state["step_count"] == 4
    resume.state.clear()
    assert not resume.is_bare and not resume.has_selection_bias


def test_the_newest_whole_checkpoint_is_taken_and_others_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 4, 6):
        save(f"out/step-{step:08d}", step)
    Path("out/step-00000006/model_config.yaml").unlink()  # LitGPT writes it last
    data = Path("out/step-00000004/lit_model.pth").read_bytes()
    Path("out/step-00000004/lit_model.pth").write_bytes(data[:1000])
    assert set_up_here("--resume", "auto").start_step == 2
    told = capsys.readouterr().err.replace("\\", "/")
    assert "Skipping out/step-00000006: it was not written to its end" in told
    assert "Skipping out/step-00000004" in told and "is damaged" in told
    assert "out/step-00000004/lit_model.pth is damaged" in refused(
        "--resume", "out/step-00000004", "--out_dir", "more"
    ).replace("\\", "/")
    assert set_up_here("--resume", "out/step-00000002", "--out_dir", "more").start_step == 2
    assert not Path("more").exists()


@pytest.mark.parametrize("name", ["final", "step-00000004"])
def test_what_a_kill_between_the_two_renames_of_a_save_left_is_resumed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(f"out/{name}", 4)
    aside = staging_for(folder, "old").name.replace(f"-{os.getpid()}.", "-99999999.")
    folder.rename(folder.with_name(aside))
    # a plan changes nothing, and a folder with a run in it is no place for another
    set_up_here("--resume", "auto", "--plan")
    assert f"A kill left out/{aside}: a run would first rename it to {name}" in told_paths(capsys)
    assert [path.name for path in Path("out").iterdir()] == [aside]
    with pytest.raises(FileNotFoundError, match=r"a kill left it as .*: rename that"):
        find_checkpoint(folder)
    assert f"there is {Path('out', aside)}" in refused("--resume", "out", "--out_dir", "more")
    assert set_up_here("--resume", "auto").start_step == 4 and folder.is_dir()
    folder.rename(folder.with_name(aside))
    assert f"out already holds a run ({name})" in refused()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A function after which as many reads of step 4 fail with an error of the disk."""

    def fail(n_times: int, number: int) -> None:
        load, calls = torch.load, []

        def read(path: Path, **options: object) -> object:
            if "step-00000004" in str(path) and len(calls) < n_times:
                calls.append(path)
                raise OSError(number, os.strerror(number))
            return load(path, **options)

        monkeypatch.setattr(torch, "load", read)

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
def test_a_read_error_that_passes_does_not_set_a_run_back(
    number: int, failing: Callable[[int, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        save(f"out/step-{step:08d}", step)
    failing(1, number)
    assert set_up_here("--resume", "auto").start_step == 4
    assert "Skipping" not in capsys.readouterr().err


def test_a_read_error_that_stays_is_no_damage(failing: Callable[[int, int], None]) -> None:
    for step in (2, 4):
        save(f"out/step-{step:08d}", step)
    failing(100, errno.EIO)
    told = refused("--resume", "auto").replace("\\", "/")
    assert "Input/output error" in told and "out/step-00000004/lit_model.pth" in told
    assert "is no sign of damage; try again" in told and "Errno" not in told
    # nor does it say that the run cannot be continued, and how to delete it
    assert "overwrite" not in refused()
    assert Path("out/step-00000004").is_dir()


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_checkpoint_with_nan_is_passed_over(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 4):
        save(f"out/step-{step:08d}", step)
    path = Path("out/step-00000004/lit_model.pth")
    state = torch.load(path, weights_only=True)
    if part == "model":
        state["model"]["lm_head.weight"][3, 3] = float("nan")
    else:
        state["optimizer"]["state"] = {0: {"exp_avg": torch.tensor([float("inf")])}}
    torch.save(state, path)
    assert set_up_here("--resume", "auto").start_step == 2
    told = told_paths(capsys)
    assert "Skipping out/step-00000004: lit_model.pth: " in told and "is damaged" not in told
    assert "holds values that are not finite (the training diverged)" in told
    if part == "model":
        told = refused("--out_dir", "more", "--initial_checkpoint_dir", "out/step-00000004")
        assert "lm_head.weight holds values that are not finite" in told


DAMAGES: dict[str, Callable[[dict], object]] = {
    "optimizer has no param_groups": lambda state: state["optimizer"].pop("param_groups"),
    "optimizer.param_groups hold 0 weights": lambda state: state["optimizer"]["param_groups"].clear(),
    "optimizer.param_groups is": lambda state: state["optimizer"]["param_groups"].append({"lr": 1.0}),
    "optimizer.state is of a weight that no group has": lambda state: state["optimizer"].update(
        state={999: {}}
    ),
    "train_dataloader is": lambda state: state["train_dataloader"].update(n_used=10**18),
}


@pytest.mark.parametrize("flaw", DAMAGES)
def test_a_checkpoint_without_a_record_whose_training_state_is_damaged_is_passed_over(
    flaw: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        save(f"out/step-{step:08d}", step)
    path = Path("out/step-00000004/lit_model.pth")
    state = torch.load(path, weights_only=True)
    DAMAGES[flaw](state)
    torch.save(state, path)
    assert set_up_here("--resume", "auto").start_step == 2
    told = told_paths(capsys)
    assert f"Skipping out/step-00000004: its training state is damaged: {flaw.partition(' has')[0]}" in told


def test_a_resume_without_the_optimizer_s_moments_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    save("out/step-00000004", 4)
    assert set_up_here("--resume", "auto").start_step == 4
    assert "out/step-00000004 holds no moments of the optimizer, which begin anew" in told_paths(capsys)


def test_a_position_in_other_data_is_refused_before_the_run_starts() -> None:
    path = save("out/step-00000004", 4) / "lit_model.pth"
    state = torch.load(path, weights_only=True)
    for position in ({}, {"current_epoch": 0, "num_samples_yielded": 8}):
        torch.save(state | {"train_dataloader": position}, path)
        told = refused("--resume", "auto")
        assert f"its train_dataloader is {position}" in told and "--initial_checkpoint_dir" in told


def test_resume_true_without_a_checkpoint_is_an_error_and_auto_starts_afresh(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "resume is true but out holds no whole step-*" in refused("--resume", "true")
    assert set_up_here("--resume", "auto").resume is None
    assert "No checkpoint to resume from in out" in capsys.readouterr().err
    assert set_up_here("--resume", "false").resume is None


def test_weights_alone_are_started_from_and_not_resumed(tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, "weights")
    assert "weights holds weights alone; start from it with --initial_checkpoint_dir" in refused(
        "--resume", "weights"
    )
    assert set_up_here("--initial_checkpoint_dir", "weights").initial is not None
    state = torch.load("weights/lit_model.pth", weights_only=True)
    torch.save(state["model"], "weights/lit_model.pth")
    bare = set_up_here("--initial_checkpoint_dir", "weights").initial
    assert bare is not None and bare.is_bare and set(bare.weights) == set(state["model"])
    torch.save({"model": 5}, "weights/lit_model.pth")
    assert "holds no model weights" in refused("--initial_checkpoint_dir", "weights")


def test_what_excludes_resuming_is_refused() -> None:
    save("out/step-00000004", 4)
    assert "resume and overwrite exclude each other" in refused("--resume", "auto", "--overwrite")
    both = ("--resume", "auto", "--initial_checkpoint_dir", "out/step-00000004")
    assert "resume and initial_checkpoint_dir exclude each other" in refused(*both)
    inside = ("--overwrite", "--initial_checkpoint_dir", "out/step-00000004")
    assert "initial_checkpoint_dir lies in out, which --overwrite deletes" in refused(*inside)
    assert "out already holds a run (step-00000004); continue it with --resume auto" in refused()
    Path("out/step-00000004/model_config.yaml").unlink()
    assert "none of it can be continued" in refused()
    assert set_up_here("--overwrite").resume is None


def test_a_command_that_is_repeated_does_not_begin_again_from_the_checkpoint_that_it_names() -> None:
    start = ("--resume", "out/step-00000004")
    save("out/step-00000004", 4)
    save("more/step-00000002", 2)
    # earlier steps of the run itself, whose last checkpoint was kept elsewhere
    assert set_up_here(*start, "--out_dir", "more").start_step == 4
    later = save("more/step-00000006", 6)
    told = refused(*start, "--out_dir", "more").replace("\\", "/")
    assert "more holds later steps than out/step-00000004 (step-00000006)" in told
    assert "continue them with --resume auto, or choose another --out_dir" in told
    assert set_up_here("--resume", "auto", "--out_dir", "more").start_step == 6
    # what cannot be continued is not gone on with
    (later / "model_config.yaml").unlink()
    assert set_up_here(*start, "--out_dir", "more").start_step == 4


def test_to_go_back_to_an_earlier_step_is_meant_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (4, 6):
        save(f"out/step-{step:08d}", step)
    monkeypatch.setattr(sys, "argv", ["/here/run_train.py", "--resume", "out/step-00000004"])
    run = set_up_here("--resume", "out/step-00000004")
    assert run.start_step == 4
    write_run_facts(run, torch.device("cpu"))
    assert "out holds later steps than out/step-00000004 (step-00000006)" in refused(
        "--resume", "out/step-00000004"
    )
    # another try from there is another command
    sys.argv[1:] = ["--resume", "out/step-00000004", "--seed", "3"]
    assert set_up_here("--resume", "out/step-00000004", "--seed", 3).start_step == 4


def test_a_run_is_not_continued_as_another_one(capsys: pytest.CaptureFixture[str]) -> None:
    save("out/step-00000004", 4)
    resumed = ("--resume", "auto")
    past = "has been trained on 1024 tokens, and train.max_tokens is 256; raise that"
    assert past in refused(*resumed, "--max_tokens", 256)
    changed = "optimizer.class_path was torch.optim.AdamW, now torch.optim.sgd.SGD"
    assert changed in refused(*resumed, "--optimizer", "SGD")
    amsgrad = refused(*resumed, "--optimizer.amsgrad", "true")
    assert "optimizer.init_args.amsgrad was None, now True; resume with what it was" in amsgrad
    assert "weight_decay_on was matrices, now all" in refused(*resumed, "--weight_decay_on", "all")
    biased = refused(*resumed, "--moe.bias_update_rate", 0.001)
    assert "was trained without a selection bias; drop moe.bias_update_rate" in biased
    capsys.readouterr()
    assert set_up_here(*resumed, "--max_tokens", 1024).n_steps == 4
    told = capsys.readouterr().err
    assert "is at the last step of train.max_tokens" in told
    assert "is of a run of 8 steps, now train.max_tokens makes it 4" in told
    model = yaml.safe_load(Path("model_config.yaml").read_text(encoding="utf-8"))
    Path("model_config.yaml").write_text(yaml.dump(model | {"n_expert": 8}), encoding="utf-8")
    assert "do not fit the model config MoE-tiny" in refused(*resumed, *NAMED)
    first = ("--out_dir", "more", "--initial_checkpoint_dir", "out/step-00000004")
    assert "do not fit the model config MoE-tiny" in refused(*first)


CHANGES = {"n_head": (2, 4), "rope_base": (10000, 5000), "norm_eps": (1e-05, 0.1), "block_size": (64, 128)}


@pytest.mark.parametrize("key", CHANGES)
def test_a_model_of_the_same_shapes_that_computes_something_else_is_not_resumed(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save("out/step-00000004", 4)
    before, now = CHANGES[key]
    edit_yaml("model_config.yaml", key, now)
    flags = ("--train.max_seq_length", 64) if key == "block_size" else ()
    text = f"model_config.yaml: {key} was {before}, now {now}; resume with what it was"
    assert text in refused("--resume", "auto", *flags, *NAMED)
    capsys.readouterr()
    initial = set_up_here(
        "--out_dir", "more", "--initial_checkpoint_dir", "out/step-00000004", *flags
    ).initial
    warning = f"Warning: out/step-00000004: {text.partition(';')[0]}; the weights were trained with"
    assert initial is not None and warning in told_paths(capsys)


def test_a_checkpoint_s_configuration_that_makes_no_sense_is_told_with_its_place() -> None:
    folder = save("out/step-00000004", 4)
    edit_yaml(str(folder / "model_config.yaml"), "n_expert_per_token", 9)
    told = refused("--resume", "auto").replace("\\", "/")
    assert "out/step-00000004/model_config.yaml: n_expert_per_token is 9 but n_expert is 4" in told


def test_a_model_with_another_name_is_the_same_model(capsys: pytest.CaptureFixture[str]) -> None:
    save("out/step-00000004", 4)
    for key, value in (("name", "mine"), ("padding_multiple", 64), ("norm_eps", 1e-5)):
        edit_yaml("model_config.yaml", key, value)
    for named in ((), NAMED):
        assert set_up_here("--resume", "auto", *named).start_step == 4
    assert "model_config.yaml:" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_tokenizer_of_the_same_size_that_is_another_is_not_resumed_with(
    name: str, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save("out/step-00000004", 4)
    shutil.copytree(tiny_tokenizer_dir, folder, dirs_exist_ok=True)
    assert set_up_here("--resume", "auto").start_step == 4
    shutil.copytree(tiny_tokenizer_dir, "other")
    if name == "tokenizer.json":
        spec = json.loads(Path("other", name).read_text(encoding="utf-8"))
        vocab = spec["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        Path("other", name).write_text(json.dumps(spec), encoding="utf-8")
    else:  # another end of a story
        Path("other/tokenizer_config.json").write_text(
            '{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8"
        )
        Path("other", name).write_text('{"bos_token_id": 1, "eos_token_id": 1}', encoding="utf-8")
    told = refused("--resume", "auto", "--tokenizer_dir", "other").replace("\\", "/")
    assert "out/step-00000004: its tokenizer is not the one in other" in told
    assert "resume with what it was" in told
    capsys.readouterr()
    flags = ("--out_dir", "more", "--tokenizer_dir", "other")
    assert set_up_here(*flags, "--initial_checkpoint_dir", "out/step-00000004").initial is not None
    assert "Warning: out/step-00000004: its tokenizer is not the one in other" in told_paths(capsys)


def test_a_run_is_not_resumed_with_a_tokenizer_that_is_not_there(tiny_tokenizer_dir: Path) -> None:
    shutil.copytree(tiny_tokenizer_dir, save("out/step-00000004", 4), dirs_exist_ok=True)
    told = refused("--resume", "auto", "--tokenizer_dir", "othr")
    assert "othr/tokenizer.json: not found" in told.replace("\\", "/") and not Path("othr").exists()


def test_embeddings_that_are_tied_now_and_were_not_are_told_as_such() -> None:
    save("out/step-00000004", 4)
    told = refused("--resume", "auto", "--train.tie_embeddings", "true")
    assert "train.tie_embeddings was None, now True; resume with what it was" in told


def test_a_context_length_that_is_named_now_and_was_the_model_s_is_the_same() -> None:
    save("out/step-00000004", 4)
    assert set_up_here("--resume", "auto", "--train.max_seq_length", 64).start_step == 4
    assert "train.max_seq_length was None, now 32" in refused("--resume", "auto", "--max_seq_length", 32)


def test_embeddings_that_are_tied_from_a_checkpoint_with_two_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    save("out/step-00000004", 4)
    flags = ("--out_dir", "more", "--initial_checkpoint_dir", "out/step-00000004")
    set_up_here(*flags)
    assert "lm_head" not in capsys.readouterr().err
    set_up_here(*flags, "--train.tie_embeddings", "true")
    assert "Warning: out/step-00000004: its lm_head.weight is not its transformer.wte.weight" in told_paths(
        capsys
    )


def test_what_may_change_on_a_resume_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    save("out/step-00000004", 4)
    assert set_up_here("--resume", "auto").start_step == 4
    capsys.readouterr()
    set_up_here("--resume", "auto", "--moe.aux_loss_coef", 0.5, "--train.save_interval", 7, "--seed", 3)
    (line,) = [line for line in told_paths(capsys).splitlines() if line.startswith("Changed since")]
    assert line.startswith("Changed since out/step-00000004: ")
    assert "moe.aux_loss_coef 0.0 -> 0.5" in line and "seed 42 -> 3" in line
    assert "save_interval" not in line and "out_dir" not in line


def test_what_else_stands_in_a_checkpoint_s_settings_is_of_no_matter() -> None:
    save(
        "out/step-00000004", 4, model_config={"n_layer": 2}, config="other.yaml", train={"max_tokens": "all"}
    )
    assert set_up_here("--resume", "auto").start_step == 4


def test_an_alias_in_a_checkpoint_s_settings_is_refused() -> None:
    path = save("out/step-00000004", 4) / "train_config.yaml"
    path.write_text("seed: &a 1\nnum_nodes: *a\n", encoding="utf-8")
    assert "it holds an alias" in refused("--resume", "auto")


def test_a_step_that_its_folder_s_name_belies_is_not_resumed() -> None:
    save("out/step-00000004", 6)
    assert "holds no whole step-*" in refused("--resume", "true")


@pytest.mark.usefixtures("eager")
def test_other_data_of_the_same_size_are_told(
    tiny_data: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, "d")
    for split in ("train", "val"):
        edit_yaml("train_config.yaml", f"data.init_args.{split}_data_path", f"d/{split}")
    assert run("--max_tokens", 1024) == 0
    assert run("--max_tokens", 1024, "--resume", "auto") == 0
    assert "Changed since" not in told_paths(capsys)
    text = Path("d/train/stories.txt")
    text.write_text(text.read_text(encoding="utf-8").replace("red ball", "big ball"), encoding="utf-8")
    assert run("--max_tokens", 1280, "--resume", "auto", "--schedule.name", "constant") == 0
    assert "Changed since out/step-00000004: the data" in told_paths(capsys)


@pytest.mark.usefixtures("eager")
def test_a_whole_resumed_run_reads_its_checkpoint_once_and_builds_no_model_at_a_step(
    opened: list[Path], built: list[GPT]
) -> None:
    assert run("--max_tokens", 1024) == 0
    shutil.rmtree("out/final")
    opened.clear()
    built.clear()
    assert run("--max_tokens", 2048, "--resume", "auto", "--train.max_time", 600) == 0
    assert [path.parent.name for path in opened].count("step-00000004") == 1
    # four to set up (see above), that which trains, two for its optimizer and its FLOPs, two for the story
    assert len(built) <= 8
