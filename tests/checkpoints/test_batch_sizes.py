"""The sequences in each step of a run whose batch size has changed, worked out by hand."""

from litgpt_moe.checkpoints.batch_sizes import BatchSizes


def test_steps_and_sequences_are_counted_over_changes() -> None:
    sizes = BatchSizes.constant(8).changed(20, 16).changed(22, 4)
    assert sizes.to_list() == [[0, 8], [20, 16], [22, 4]] and BatchSizes.from_list(sizes.to_list()) == sizes
    assert [sizes.sequences(n) for n in (0, 1, 20, 21, 22, 25)] == [0, 8, 160, 176, 192, 204]
    assert [sizes.size(step) for step in (1, 20, 21, 22, 23, 99)] == [8, 8, 16, 16, 4, 4]
    counts = (0, 7, 8, 159, 160, 175, 176, 192, 195, 204)
    assert [sizes.steps(n) for n in counts] == [0, 0, 1, 19, 20, 20, 21, 22, 22, 25]


def test_what_did_not_change_or_never_came_to_be_is_not_kept() -> None:
    sizes = BatchSizes.constant(8)
    assert sizes.changed(20, 8) == sizes and sizes.changed(0, 4) == BatchSizes.constant(4)
    # resumed from step 10 after a resume with 16 at step 20, or twice without a step between
    assert sizes.changed(20, 16).changed(10, 4).to_list() == [[0, 8], [10, 4]]
    assert sizes.changed(20, 16).changed(20, 4).to_list() == [[0, 8], [20, 4]]
    assert sizes.changed(20, 16).changed(20, 8) == sizes
