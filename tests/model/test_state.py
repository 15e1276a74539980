import pytest
import torch

from tnl.model.state import TransnormerCache


def filled(rows: int = 3) -> TransnormerCache:
    cache = TransnormerCache(2)
    cache.states = [torch.arange(rows).float()[:, None, None, None].expand(rows, 2, 4, 4).clone() for _ in range(2)]
    cache.advance(5, torch.arange(rows))
    return cache


def test_size_is_counted_and_columns_advance() -> None:
    cache = filled()
    assert cache.num_bytes == 2 * 3 * 2 * 4 * 4 * 4
    cache.advance(2, torch.tensor([2, 0, 1]))
    assert cache.get_seq_length() == 7 and cache.seen is not None and cache.seen.tolist() == [2, 1, 3]


def test_rows_are_reordered_selected_and_repeated_with_their_counts() -> None:
    cache = filled()
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert cache.states[0] is not None and cache.seen is not None
    assert cache.states[0][:, 0, 0, 0].tolist() == [2, 2, 0] == cache.seen.tolist()
    cache.batch_select_indices(torch.tensor([1, 2]))
    cache.batch_repeat_interleave(2)
    assert cache.states[1] is not None
    assert cache.states[1][:, 0, 0, 0].tolist() == [2, 2, 0, 0] == cache.seen.tolist()


def test_caches_are_joined_row_by_row() -> None:
    one, other = filled(1), filled(3)
    one.advance(7, torch.tensor([7]))
    cache = TransnormerCache.join([other, one])
    assert cache.states[1] is not None and cache.seen is not None
    assert cache.states[1][:, 0, 0, 0].tolist() == [0, 1, 2, 0] and cache.seen.tolist() == [0, 1, 2, 7] and cache.columns == 12


def test_a_clone_goes_its_own_way_and_reset_forgets() -> None:
    cache = filled()
    branch = cache.clone()
    assert cache.states[0] is not None
    cache.states[0].zero_()
    cache.reset()
    assert cache.num_bytes == 0 and cache.get_seq_length() == 0 and not cache.has_previous_state()
    assert branch.states[0] is not None and branch.states[0][2].eq(2).all() and branch.get_seq_length() == 5


def test_a_state_cannot_be_cropped() -> None:
    with pytest.raises(NotImplementedError, match="clone"):
        filled().crop(-1)
