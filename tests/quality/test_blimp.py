"""Minimal pairs: the files they come in, and probabilities against a plain loop and against Transformers."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from helpers.hub import serve
from helpers.interop import transformers_model
from helpers.quality import rows_of_pairs, write_pairs

from evaluate import main
from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.interop.export_folder import write_folder
from litgpt_moe.quality.blimp import score_pairs, sentence_nats, summarize
from litgpt_moe.quality.pairs import Paradigm, read_paradigms

pytestmark = pytest.mark.usefixtures("eager")


def evaluated(capsys: pytest.CaptureFixture[str], *flags: object) -> dict:
    assert main(["--no_loss", "--json", "--device=cpu", "--results_file=none", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    assert main(["--no_loss", "--device=cpu", "--results_file=none", *map(str, flags)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_a_model_that_knows_the_good_sentences_is_right_on_all_pairs(overfitted, tmp_path, capsys):
    known = overfitted(" ".join(SENTENCES[:1]))
    rows = {name: each[:1] for name, each in rows_of_pairs().items()}
    result = evaluated(capsys, "--ckpt_dir", known, "--blimp", write_pairs(tmp_path / "pairs", rows))
    assert result["loss"] is None and result["blimp"]["accuracy"] == 1.0
    assert result["blimp"]["paradigms"] == {"colours": 1.0, "ends": 1.0, "orders": 1.0}


def test_the_log_probability_is_that_of_a_plain_loop_over_the_tokens(tiny_checkpoint):
    from litgpt import GPT, Config

    sentences = [[1, 300, 270, 310], [1, 260], [1, 300, 270, 310, 280, 290], [1, 300, 270, 310]]
    plain = GPT(Config.from_file(tiny_checkpoint / "model_config.yaml"))
    plain.load_state_dict(torch.load(tiny_checkpoint / "lit_model.pth", weights_only=True)["model"])
    wanted = []
    for ids in sentences:
        with torch.no_grad():
            rows = [plain(torch.tensor([ids[:end]]))[0, -1].double() for end in range(1, len(ids))]
        wanted.append(-sum(row.log_softmax(0)[i].item() for row, i in zip(rows, ids[1:], strict=True)))
    found = sentence_nats(load_model(tiny_checkpoint), [np.array(ids, np.uint16) for ids in sentences], 8)
    assert found == pytest.approx(wanted, abs=1e-5) and found[0] == found[3]


def test_an_exported_model_has_the_same_figures_in_transformers(tiny_checkpoint, tmp_path):
    import transformers

    paradigms, _ = read_paradigms(write_pairs(tmp_path / "pairs"))
    ours = score_pairs(load_model(tiny_checkpoint), tiny_checkpoint, paradigms, 8)
    write_folder(tiny_checkpoint, tmp_path / "hf", None, None, is_checked=False)
    theirs = transformers_model(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")

    def log_probability(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logs = theirs(ids).logits[0, :-1].log_softmax(-1)
        return logs.gather(1, ids[0, 1:, None]).double().sum().item()

    for paradigm in paradigms:
        right = [log_probability(good) > log_probability(bad) for good, bad in paradigm.pairs]
        assert ours["paradigms"][paradigm.name] == sum(right) / len(right)
    assert 0 < ours["accuracy"] < 1  # random weights; not a comparison of nothing with nothing


def test_groups_are_means_of_their_paradigms():
    pairs = [("a", "b")] * 4
    paradigms = [
        Paradigm("x", "f", "p", pairs),
        Paradigm("y", "f", "p", pairs * 10),
        Paradigm("z", "g", "q", pairs),
    ]
    found = summarize(paradigms, {"x": 1, "y": 40, "z": 2})
    assert found["phenomena"] == {"p": 0.625, "q": 0.5} and found["fields"] == {"f": 0.625, "g": 0.5}
    assert found["accuracy"] == pytest.approx(1.75 / 3) and found["n_pairs"] == 48
    # by hand: variances 3/64, 0 and 1/16 of the paradigms' shares
    assert found["accuracy_stderr"] == pytest.approx((3 / 64 + 1 / 16) ** 0.5 / 3)


def test_a_zip_and_the_folder_it_unpacks_to_are_the_same_pairs(tmp_path):
    folder = write_pairs(tmp_path / "unpacked" / "data")
    (folder / "._orders.jsonl").write_bytes(b"\0\1 of macOS")
    with zipfile.ZipFile(tmp_path / "BLiMP.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, f"__MACOSX/data/{path.name}" if path.name[0] == "." else f"data/{path.name}")
    (packed, of_zip), (plain, of_folder) = (
        read_paradigms(place) for place in (tmp_path / "BLiMP.zip", tmp_path / "unpacked")
    )
    assert packed == plain and of_zip["sha256"] == of_folder["sha256"]
    assert [(each.name, each.branch, each.phenomenon, len(each.pairs)) for each in packed] == [
        ("colours", "syntax_semantics", "argument_structure", 5),
        ("ends", "syntax_semantics", "order", 5),
        ("orders", "syntax_semantics", "order", 5),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "a.jsonl:1: not JSON"),
        (b'\n{"sentence_good": "A."}\n', "a.jsonl:2: no sentence_good and sentence_bad"),
        (b"[]\n", "a.jsonl:1: no sentence_good"),
        (b"\n", "holds no minimal pairs"),
        (b'{"sentence_good": "Tom", "sentence_bad": "%s"}' % (b"Tom " * 70), "over the block_size of 64"),
    ],
)
def test_pairs_that_cannot_be_scored_are_one_sentence(content, words, tmp_path, tiny_checkpoint, capsys):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert words in refusal(capsys, "--ckpt_dir", tiny_checkpoint, "--blimp", tmp_path)


def test_what_is_no_zip_or_not_there_is_one_sentence(tmp_path, tiny_checkpoint, capsys):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 and no more")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", bytes(65 << 20))
    for name, words in {
        "a.zip": "not a zip that can be read",
        "bomb.zip": "the largest of 68,157,440 bytes",
        "none": "no such file or folder of minimal pairs",
    }.items():
        error = refusal(capsys, "--ckpt_dir", tiny_checkpoint, "--blimp", tmp_path / name)
        assert words in error and name in error
    assert "--no_loss leaves nothing to score" in refusal(capsys, "--ckpt_dir", tiny_checkpoint)


def test_the_pairs_come_from_the_hub_once(tmp_path, tiny_checkpoint, run_script):
    import pyarrow
    from pyarrow import parquet

    files = {}
    for name, rows in rows_of_pairs().items():
        table = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
        path = f"/datasets/nyu-mll/blimp/resolve/main/{name}/train-00000-of-00001.parquet"
        files[path] = table.getvalue()
    command = ("evaluate.py", "--no_loss", "--ckpt_dir", tiny_checkpoint, "--device", "cpu", "--blimp", "hub")
    with serve(files) as (endpoint, handler):
        online = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = run_script(*command, env=online, cwd=tmp_path)
        fetched = [path for path in handler.asked if path.endswith(".parquet")]
    assert done.returncode == 0, done.stderr
    assert "of 15 pairs in 3 paradigms" in done.stdout and sorted(fetched) == sorted(files)
    again = run_script(*command, env={**online, "HF_ENDPOINT": "http://127.0.0.1:9"}, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert len(list((tmp_path / "data/blimp").iterdir())) == 4  # with the list of them, and no lock
    rows = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[0])["blimp"]["paradigms"] == json.loads(rows[1])["blimp"]["paradigms"]


def test_random_weights_are_right_half_of_the_time(tmp_path, tiny_checkpoint, tiny_tokenizer_dir, capsys):
    rng = np.random.default_rng(0)
    words = " ".join(SENTENCES).split()
    rows = [
        {"sentence_good": " ".join(rng.choice(words, 8)), "sentence_bad": " ".join(rng.choice(words, 8))}
        for _ in range(400)
    ]
    flags = ["--random_weights", "--model_config", tiny_checkpoint / "model_config.yaml"]
    flags += ["--tokenizer_dir", tiny_tokenizer_dir, "--blimp", write_pairs(tmp_path / "p", {"any": rows})]
    found = evaluated(capsys, *flags)["blimp"]
    assert abs(found["accuracy"] - 0.5) < 4 * found["accuracy_stderr"] < 0.11
    assert found["phenomena"] == {"other": found["accuracy"]}
