"""TextShards as LitGPT's loop uses it: by its class path, across a resume, with too little text."""

import pickle
from pathlib import Path

import pytest
from helpers.data import make_text, write_text

from litgpt_moe.data.batches import TokenStream
from litgpt_moe.data.module import TextShards
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings


def test_saved_files_name_the_class_by_the_script_that_gives_it() -> None:
    import prepare_data  # which gives the class once it is asked for

    assert prepare_data.TextShards is TextShards
    assert f"{TextShards.__module__}.{TextShards.__qualname__}" == "prepare_data.TextShards"
    assert pickle.loads(pickle.dumps(TextShards)) is TextShards


def test_data_arguments_that_could_not_be_honoured_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose FOLDER/train and FOLDER/val"):
        TextShards(tmp_path / "train", tmp_path / "other" / "val")
    with pytest.raises(ValueError, match="num_workers is -1; choose 0 or more"):
        TextShards(tmp_path / "train", num_workers=-1)


def test_resume_is_bitwise_equal_across_an_epoch_end(
    settings: PrepareSettings, tmp_path: Path, eager: None
) -> None:
    import lightning
    from litgpt.utils import CycleIterator

    prepare(settings)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)

    def loader() -> object:
        shards = TextShards(settings.data_dir / "train", tokenizer_dir=settings.tokenizer_dir)
        shards.connect(batch_size=8, max_seq_length=64)
        return fabric.setup_dataloaders(shards.train_dataloader())

    state = {"train_dataloader": loader()}
    per_epoch = len(state["train_dataloader"])
    cycle = CycleIterator(state["train_dataloader"])
    for n_seen in range(1, 2 * per_epoch + 2):
        next(cycle)
        if n_seen in (1, per_epoch - 1, per_epoch, per_epoch + 1):
            fabric.save(tmp_path / f"{n_seen}.ckpt", state)
    cycle = CycleIterator(loader())
    expected = [next(cycle) for _ in range(3 * per_epoch)]
    for n_seen in (1, per_epoch - 1, per_epoch, per_epoch + 1):
        state = {"train_dataloader": loader()}
        fabric.load(tmp_path / f"{n_seen}.ckpt", state)
        cycle = CycleIterator(state["train_dataloader"])
        for batch in expected[n_seen:]:
            assert next(cycle).equal(batch), n_seen


def test_litgpts_own_loop_gets_its_loaders_from_the_class_path(settings: PrepareSettings) -> None:
    import jsonargparse
    import lightning
    from litgpt import Tokenizer
    from litgpt.args import TrainArgs
    from litgpt.data import DataModule
    from litgpt.pretrain import get_dataloaders

    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--data", type=DataModule)
    arguments = {
        "train_data_path": str(settings.data_dir / "train"),
        "tokenizer_dir": str(settings.tokenizer_dir),
    }
    config = {"data": {"class_path": "prepare_data.TextShards", "init_args": arguments}}
    data = parser.instantiate_classes(parser.parse_object(config)).data
    assert type(data) is TextShards
    prepare(settings)
    write_text(settings.data_dir / "val" / "b.txt", make_text(5, seed=4))  # stale: made again by the loop
    tokenizer = Tokenizer(settings.tokenizer_dir)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    train, val = get_dataloaders(fabric, data, tokenizer, TrainArgs(micro_batch_size=4), 32)
    assert next(iter(train)).shape == (4, 33)
    ids = TokenStream(settings.data_dir, "val")
    rows = [row for batch in val for row in batch.tolist()]
    assert rows == [ids.read(i * 32, i * 32 + 33).tolist() for i in range((len(ids) - 1) // 32)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_too_little_text_is_named_with_numbers(settings: PrepareSettings, split: str) -> None:
    prepare(settings)
    shards = TextShards(settings.data_dir / "train", tokenizer_dir=settings.tokenizer_dir)
    shards.connect(batch_size=4, max_seq_length=100_000)
    has = rf"the {split} split has [\d,]+ tokens, 0 sequences of 100000, but [14] are needed"
    with pytest.raises(ValueError, match=rf"{has}; choose a max_seq_length of \d+ or less, or put") as raised:
        getattr(shards, f"{split}_dataloader")()
    assert ("--val_fraction" in str(raised.value)) == (split == "val")


def test_a_batch_larger_than_the_text_is_named_as_what_to_change(settings: PrepareSettings) -> None:
    prepare(settings)
    shards = TextShards(settings.data_dir / "train", tokenizer_dir=settings.tokenizer_dir)
    shards.connect(batch_size=4096, max_seq_length=64)
    with pytest.raises(ValueError, match=r"choose a micro_batch_size of \d+ or less, or put more"):
        shards.train_dataloader()
    assert shards.val_dataloader()  # is as long as it is


def test_tokens_that_fill_no_sequence_are_counted_once_where_they_are_many(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(settings)
    n_tokens = len(TokenStream(settings.data_dir, "train"))
    for block_size, is_told in ((n_tokens * 2 // 3, True), (n_tokens - 1, False)):
        shards = TextShards(settings.data_dir / "train", tokenizer_dir=settings.tokenizer_dir)
        shards.connect(batch_size=1, max_seq_length=block_size)
        shards.max_seq_length = block_size + 1  # one more, as LitGPT's loop sets it
        capsys.readouterr()
        shards.train_dataloader()
        told = f"the last {n_tokens - 1 - block_size:,} of {n_tokens:,} training tokens fill no sequence"
        assert (told in capsys.readouterr().err) is is_told
