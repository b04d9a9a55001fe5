"""Passes over memory are counted as by hand, on layers small enough to do so."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional

from benchmarks.flops import wan_work
from benchmarks.gpu_families import generation_family, training_family
from benchmarks.gpu_rows import GENERATION, TRAINING, WAN_14B, Row, Size
from benchmarks.gpu_steps import random_batch, random_request
from benchmarks.traffic import Rates, Traffic, chosen, count_denoising, count_training, report
from benchmarks.traffic_count import (
    AGAIN,
    ATTENTION,
    CAST,
    COPY,
    ELEMENTWISE,
    FORWARD,
    NORM,
    PRODUCT,
    THIN,
    Counting,
    Operation,
)
from modules.planning.dry_run import dry_run
from tests.tiny.wan_dit import tiny_state, write_dit

RATES = Rates(790e12, 600e12, 4.3e12)
L, C, WIDE = 320, 512, 1024


def counted(work: Callable[[torch.device], object]) -> list[Operation]:
    with (
        dry_run() as ledger,
        torch.autograd.set_detect_anomaly(True, check_nan=False),
        Counting(ledger.device) as counting,
    ):
        work(ledger.device)
    return counting.operations


def sizes(operations: list[Operation]) -> list[tuple[str, str, int]]:
    return [(one.phase, one.group, one.size) for one in operations]


def test_kernels_of_a_small_block_are_counted_as_by_hand() -> None:
    def work(device: torch.device) -> None:
        x = torch.empty(1, L, C, device=device)
        weight, bias = torch.empty(WIDE, C, device=device), torch.empty(WIDE, device=device)
        down = torch.empty(32, C, device=device)
        normed = functional.layer_norm(x, (C,))
        functional.linear(normed, weight, bias)
        functional.linear(normed, down)
        normed.to(torch.bfloat16)
        torch.addcmul(x, torch.empty(1, 1, C, device=device).expand(1, L, C), normed)
        x.add_(1)
        torch.cat([x, x.view(1, L, C)], dim=1)
        torch.mul(x, 2, out=torch.empty(1, L, C, dtype=torch.bfloat16, device=device))

    tokens = 4 * L * C
    assert sizes(counted(work)) == [
        (FORWARD, NORM, 2 * tokens + 2 * 4 * L),
        (FORWARD, PRODUCT, tokens + 4 * WIDE * C + 4 * WIDE + 4 * L * WIDE),
        (FORWARD, THIN, tokens + 4 * 32 * C + 4 * L * 32),
        (FORWARD, CAST, tokens + tokens // 2),
        (FORWARD, ELEMENTWISE, 3 * tokens + 4 * C),
        (FORWARD, ELEMENTWISE, 2 * tokens),
        (FORWARD, COPY, 3 * tokens),
        (FORWARD, ELEMENTWISE, tokens + tokens // 2),
    ]


@pytest.mark.parametrize("generates", [False, True])
def test_the_operations_of_a_tiny_model_are_those_of_its_sizes(tmp_path: Path, generates: bool) -> None:
    path = write_dit(tmp_path, tiny_state("t2v", dtype=torch.bfloat16, num_layers=3))
    options = () if generates else ("--gradient_checkpointing",)
    kind = GENERATION if generates else TRAINING
    row = Row("tiny", kind, WAN_14B, Size(288, 288, 5), "", options, text_tokens=512)

    found, config = tiny_traffic(row, path)

    work = wan_work(config, 2 * 18 * 18)
    attention = chosen(found.step, group=ATTENTION).operations
    assert attention == (2 if generates else 4.5) * (work.attention + work.cross)
    products = sum(chosen(found.step, group=group).operations for group in (PRODUCT, THIN))
    if generates:
        assert products == pytest.approx(2 * work.linear, rel=0.25)  # and what is outside the blocks
    else:
        assert products > 3 * work.linear - work.last  # and those of a LoRA that is wide for this model
    assert (chosen(found.step, AGAIN).count > 0) is not generates
    lines = "\n".join(report(found, RATES, most=1000))
    assert "wan/model.py" in lines
    assert "modules/layers/rope.py" in lines


def tiny_traffic(row: Row, path: Path) -> tuple[Traffic, object]:
    if row.kind == GENERATION:
        options, family = generation_family(row, path)
        found = count_denoising(family, options, *random_request(row, family), RATES)
    else:
        options, family = training_family(row, path)
        found = count_training(family, options, random_batch(row, family), RATES)
    return found, family.files.dit_header().config
