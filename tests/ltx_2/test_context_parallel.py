"""Two processes that share the tokens of both streams make what one makes, but for the order of sums."""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from ltx_2.blocks import LtxAudioReferences, LtxReferences
from ltx_2.configs import AUDIO, VIDEO
from ltx_2.model import NO_REFERENCES
from protocols.steps import CleanTokens, NagText, Overrides
from runtime.offload.context import ProcessGrid
from runtime.ways.context_parallel_tokens import share_tokens
from tests.ltx_2.tiny_dit import dit_inputs, tiny_dit

PROCESSES = 2
# 15 tokens a frame and 7 of sound: neither is divided evenly, and the given ones are a part of a part
SIZE = (3, 3, 5, 6)


def toward_middle(first: Tensor, second: Tensor) -> Tensor:
    return 0.5 * (first + second)


def losses_and_gradients() -> dict[str, tuple[Tensor, Tensor]]:
    """Return by case the velocities of both streams, and the gradients of all weights, each in one tensor."""
    given = dit_inputs("2.3", SIZE) | {"has_audio": torch.tensor([True, False])}
    nag = NagText({"text": given["text"].flip(-1), "audio_text": given["audio_text"].flip(-1)}, toward_middle)
    cases: dict[str, Overrides] = {
        "both": Overrides(num_clean_frames=1),
        "nag": Overrides(nag=nag),
        "values": Overrides(skip_self_attention=frozenset({0}), isolate_modalities=True),
    }
    cases |= dict.fromkeys(
        ("references", "noisy references", "dimmed references", "hidden audio"), Overrides()
    )
    noisy, audio = given["noisy"], given["audio"]
    shares = torch.arange(noisy[:, :1].numel()).view_as(noisy[:, :1]) % 3 * 500
    of_audio = torch.arange(audio.shape[2]).view(1, 1, -1, 1) % 2 * 1000
    cases["given"] = cases["keyframes"] = Overrides(
        clean_tokens=CleanTokens(shares.short(), of_audio.short())
    )
    drawn = torch.randn(2, given["noisy"].shape[1], 2, 3, 5, generator=torch.Generator().manual_seed(5))
    more = {
        "references": {VIDEO: LtxReferences([drawn, drawn[:, :, :1]])},
        "noisy references": {VIDEO: LtxReferences([drawn], timestep_fraction=0.5)},
        "dimmed references": {
            VIDEO: LtxReferences([drawn, drawn[:, :, :1]], attention_strengths=torch.linspace(0, 1, 45))
        },
        "hidden audio": {
            AUDIO: LtxAudioReferences(
                [0.5 * audio[:, :, :5]],
                ends_before_audio=True,
                is_hidden_from_video=True,
                is_without_text=True,
            )
        },
    }
    found = {}
    for name, overrides in cases.items():
        dit = tiny_dit("2.3").requires_grad_(True)
        if distributed.is_initialized():
            share_tokens(dit, ProcessGrid(distributed.get_rank(), 1, context=PROCESSES), torch.device("cpu"))
        made = torch.cat(
            [
                one.flatten()
                for one in dit(
                    **given,
                    references=more.get(name, NO_REFERENCES),
                    overrides=overrides,
                    keyframes=(9,) if name == "keyframes" else (),
                )
                if one is not None
            ]
        )
        peers = PROCESSES if distributed.is_initialized() else 1
        (made.square().mean() / peers).backward()
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in dit.parameters()]
        joined = torch.cat([one.flatten() for one in gradients])
        if distributed.is_initialized():
            distributed.all_reduce(joined)
        found[name] = made.detach(), joined
    return found


def run_process(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    torch.save(losses_and_gradients(), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo is tested there")
def test_processes_that_share_both_streams_make_what_one_makes(tmp_path: Path) -> None:
    start: Any = multiprocessing.get_context("spawn")
    processes = [start.Process(target=run_process, args=(rank, tmp_path)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    expected = losses_and_gradients()
    for process in processes:
        process.join(timeout=300)

    assert [process.exitcode for process in processes] == [0] * PROCESSES
    for rank in range(PROCESSES):
        for name, tensors in torch.load(tmp_path / f"{rank}.pt").items():
            for one, other in zip(tensors, expected[name], strict=True):
                assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name
