"""Caches whose rows are joined and selected go on as if each row had been alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opdkit.models.body import hidden_states
from opdkit.sampling.kv_cache import join, new_cache, pad_left, select, shrink, tokens_that_fit
from opdkit.sampling.kv_layer import ROOM
from tests.common.rounding import FORWARD
from tests.common.tiny import tiny_model

IDS = torch.randint(3, 320, (3, 90), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("lengths", [(5, 20), (20, 5), (3, 6), (9, 9)])
@pytest.mark.parametrize(("kind", "config"), [("qwen3", {}), ("gemma2", {"sliding_window": 8})])
@torch.inference_mode()
def test_joined_rows_continue_like_separate_ones(
    kind: str, config: dict[str, int], lengths: tuple[int, int]
) -> None:
    model = tiny_model(kind, **config)
    caches, columns = [new_cache(model), new_cache(model)], max(lengths)
    for row, (cache, length) in enumerate(zip(caches, lengths)):
        hidden_states(model, IDS[row : row + 1, :length], None, past_key_values=cache)
    join(*caches)
    mask = torch.cat(
        [pad_left(torch.ones(1, length, dtype=torch.bool), columns, 1) for length in lengths]
    )
    for _ in range(3):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        length = mask.sum(1)
        token = IDS[torch.arange(2), length - 1]
        joined = hidden_states(model, token[:, None], mask, length[:, None] - 1, caches[0])[:, 0]
        alone = [
            hidden_states(model, IDS[row : row + 1, : int(length[row])], None)[0, -1]
            for row in range(2)
        ]
        assert torch.allclose(joined, torch.stack(alone), atol=FORWARD)
    # the shorter row stays, twice, without the columns that only the other one used
    first = int(lengths[0] > lengths[1])
    select(caches[0], torch.tensor([first, first]), columns - min(lengths))
    length = min(lengths) + 3
    assert caches[0].get_seq_length() == length
    token = IDS[first, length].expand(2, 1)
    kept = hidden_states(model, token, None, torch.full((2, 1), length), caches[0])[:, 0]
    alone_again: Tensor = hidden_states(model, IDS[first : first + 1, : length + 1], None)[0, -1]
    assert torch.allclose(kept, alone_again.expand(2, -1), atol=FORWARD)


@pytest.mark.parametrize("grown", [0, 3], ids=["as prefilled", "with room"])
@pytest.mark.parametrize(("kind", "config"), [("qwen3", {}), ("gemma2", {"sliding_window": 8})])
@torch.inference_mode()
def test_rows_that_move_into_free_places_go_on(
    kind: str, config: dict[str, int], grown: int
) -> None:
    """Of rows 0, 1, 2 the first leaves: row 2 takes its place, and nothing else is copied."""
    model = tiny_model(kind, **config)
    cache = new_cache(model)
    hidden_states(model, IDS[:, :10], None, past_key_values=cache)
    for t in range(10, 10 + grown):
        hidden_states(model, IDS[:, t : t + 1], None, torch.full((3, 1), t), cache)
    where = cache.layers[-1].keys.data_ptr()
    shrink(cache, torch.tensor([0]), torch.tensor([2]), 2)
    assert cache.layers[-1].keys.data_ptr() == where and cache.layers[-1].keys.shape[0] == 2
    rows, length = torch.tensor([2, 1]), 10 + grown
    for t in range(length, length + 2):
        left = hidden_states(model, IDS[rows, t : t + 1], None, torch.full((2, 1), t), cache)[:, 0]
    torch.testing.assert_close(
        left, hidden_states(model, IDS[rows, : length + 2], None)[:, -1], rtol=0, atol=FORWARD
    )


@torch.inference_mode()
def test_tokens_are_written_in_place_until_the_room_is_used() -> None:
    model, cache, steps = tiny_model(layers=1), None, []
    cache = new_cache(model)
    hidden_states(model, IDS[:, :10], None, past_key_values=cache)
    for t in range(10, 10 + ROOM + 1):
        hidden = hidden_states(model, IDS[:, t : t + 1], None, torch.full((3, 1), t), cache)
        steps.append(cache.layers[0].keys.data_ptr())
    assert len(set(steps[:ROOM])) == 1 and steps[ROOM] != steps[0]
    assert torch.allclose(
        hidden[:, 0], hidden_states(model, IDS[:, : 11 + ROOM], None)[:, -1], atol=FORWARD
    )


def test_two_gibibytes_of_a_cpu_hold_the_keys_and_values() -> None:
    # 2 key-value heads of width 8 in float32: 2 * 3 * 2 * 8 * 4 bytes a token
    model = tiny_model(layers=3)
    assert tokens_that_fit(model) == 2**31 // 384
