"""What a card holds and computes that shares a clip's tokens with others: as with a clip of fewer tokens."""

from pathlib import Path

import pytest
import torch

from modules.planning.communication import EXCHANGED, WorkCounter, divide_tokens
from modules.planning.dry_run import BATCH, IN_BLOCKS
from tests.training.planning.test_rehearsal import CHECKPOINTED, LAYERS, wan, wan_batch
from training.planning.memory import predict
from training.planning.several_cards import count_work

CPU = torch.device("cpu")
DIM, TEXT = 128, 8  # of tiny Wan: numbers of a token, tokens of the longer text


def test_half_of_the_tokens_takes_what_a_clip_of_half_the_size_does(tmp_path: Path) -> None:
    family, options = wan(tmp_path, *CHECKPOINTED)
    counter = WorkCounter()
    whole = predict(family, options, wan_batch(1, (3, 128, 128)), CPU, watch=counter.watch)
    half = predict(family, options, wan_batch(1, (3, 64, 128)), CPU)

    found = divide_tokens(whole.moments, 2, count_work(whole, counter))

    buffers = EXCHANGED * 3 * 64 * 64 * DIM * 2 // 2
    inside = [name for name in found if name.startswith(IN_BLOCKS)]
    assert len(inside) >= 2 * LAYERS - 2
    for name in inside:
        # the batch stays whole; and steps that work in pieces beyond some size take one tensor less
        ours, theirs = ({**moment, BATCH: 0} for moment in (found[name], half.moments[name]))
        assert sum(ours.values()) == pytest.approx(sum(theirs.values()) + buffers, rel=0.06), name


def test_work_is_counted_by_closed_forms(tmp_path: Path) -> None:
    family, options = wan(tmp_path, *CHECKPOINTED, "--gradient_accumulation_steps", "3")
    counter = WorkCounter()
    prediction = predict(family, options, wan_batch(2, (3, 32, 64)), CPU, watch=counter.watch)

    work = count_work(prediction, counter)

    tokens, config = 2 * 3 * 16 * 32, family.files.dit_header().config
    assert config.dim == DIM
    # queries, keys, values and results, forward and again; and their gradients
    assert work.attended == LAYERS * 3 * 4 * tokens * DIM * 2
    assert (work.heads, work.largest) == (config.num_heads, tokens * DIM * 2)
    assert (work.passes, work.micro_batches) == (2, 3)
    assert work.joined == work.tokens == tokens * DIM * 4  # in float32
    # products of weights and tokens forward, again, and for the gradient of the tokens; LoRAs are thin
    attention, feed_forward = 4 * DIM * DIM, 2 * DIM * config.ffn_dim
    to_text = 2 * 2 * TEXT * DIM * DIM  # keys and values of the texts of two clips
    linear = 2 * (tokens * (attention + attention // 2 + feed_forward) + to_text)
    scores = 4 * (tokens * tokens // 2 + tokens * TEXT) * DIM
    expected = LAYERS * (3 * linear + (2 + 2.5) * scores)
    assert work.operations == pytest.approx(expected, rel=0.1)
