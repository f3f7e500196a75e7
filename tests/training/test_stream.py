"""The order of the data depends on the seed and the position alone."""

import pytest
import torch

from blip3o_fast.training.stream import BatchStream, SampleOrder, stream_loader


def test_each_epoch_shows_each_picture_once_in_another_order():
    order = SampleOrder(10, seed=3)
    epochs = [order.pictures(epoch * 10, 10).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # The second epoch of one seed is not the first of the next.
    assert SampleOrder(10, seed=4).pictures(0, 10).tolist() not in epochs


def test_pieces_of_any_size_are_pieces_of_one_stream():
    whole = SampleOrder(7, seed=0).pictures(0, 60).tolist()
    order = SampleOrder(7, seed=0)
    for size in (1, 3, 7, 11, 60):
        pieces = [order.pictures(start, min(size, 60 - start)).tolist() for start in range(0, 60, size)]
        assert sum(pieces, []) == whole
    assert order.pictures(0, 0).tolist() == []
    with pytest.raises(ValueError, match="at least 1 picture"):
        SampleOrder(0, seed=0)


def samples(batch_size, world_size, micro_batches):
    """{global sample index: value of the picture} over all ranks."""
    values = torch.arange(9.0)[:, None, None]
    seen = {}
    for rank in range(world_size):
        stream = BatchStream(values, values, SampleOrder(9, 1), batch_size, rank=rank, world_size=world_size)
        for k in range(micro_batches):
            batch = stream[k]
            assert torch.equal(batch["target"], batch["encoder_hidden_states"])
            for i, value in enumerate(batch["target"].flatten().tolist()):
                assert batch["sample_index"] + i not in seen
                seen[batch["sample_index"] + i] = value
    return seen


def test_ranks_and_batch_size_do_not_change_what_a_sample_index_means():
    one = samples(12, 1, 2)
    assert samples(3, 4, 2) == samples(4, 1, 6) == samples(6, 2, 2) == one
    assert sorted(one) == list(range(24))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_begins_where_it_is_told_and_keeps_the_runs_length(workers):
    values = torch.arange(5.0)[:, None, None]
    stream = BatchStream(values, values, SampleOrder(5, 2), 2, rank=0, world_size=1)
    position = 0
    loader = stream_loader(stream, 8, lambda: position, num_workers=workers, pin_memory=False)
    everything = [batch["target"].flatten().tolist() for batch in loader]
    position = 5
    rest = [batch["target"].flatten().tolist() for batch in loader]
    assert len(everything) == len(loader) == 8
    assert rest == everything[5:]
