"""What a card holds and computes that shares a clip's tokens with others: as with a clip of fewer tokens."""

from pathlib import Path

import pytest
import torch

from runtime.planning.division import NUM_EXCHANGE_BUFFERS, TokenCounter, divide_tokens
from runtime.planning.dry_run import BATCH, IN_BLOCKS
from tests.training.planning.test_rehearsal import CHECKPOINTED, LAYERS, wan, wan_batch
from training.planning.memory import predict_memory

CPU = torch.device("cpu")
DIM = 128  # of tiny Wan: numbers of a token


@pytest.mark.slow
def test_half_of_the_tokens_takes_what_a_clip_of_half_the_size_does(tmp_path: Path) -> None:
    family, options = wan(tmp_path, *CHECKPOINTED)
    counter = TokenCounter()
    full = predict_memory(family, options, wan_batch(1, (3, 128, 128)), CPU, watch=counter.watch)
    half = predict_memory(family, options, wan_batch(1, (3, 64, 128)), CPU)

    found = divide_tokens(full.phase_peaks, 2, counter)

    buffers = NUM_EXCHANGE_BUFFERS * 3 * 64 * 64 * DIM * 2 // 2
    inside = [name for name in found if name.startswith(IN_BLOCKS)]
    assert len(inside) >= 2 * LAYERS - 2
    for name in inside:
        # the batch stays whole; and steps that work in pieces beyond some size take one tensor less
        ours, theirs = ({**moment, BATCH: 0} for moment in (found[name], half.phase_peaks[name]))
        assert sum(ours.values()) == pytest.approx(sum(theirs.values()) + buffers, rel=0.06), name


@pytest.mark.slow
def test_what_cards_share_is_counted_by_closed_forms(tmp_path: Path) -> None:
    family, options = wan(tmp_path, *CHECKPOINTED)
    counter = TokenCounter()
    predict_memory(family, options, wan_batch(2, (3, 32, 64)), CPU, watch=counter.watch)

    tokens, config = 2 * 3 * 16 * 32, family.files.dit_header().config
    assert config.dim == DIM
    assert (counter.heads, counter.query_bytes) == (config.num_heads, tokens * DIM * 2)
    assert counter.token_bytes == tokens * DIM * 4  # in float32
