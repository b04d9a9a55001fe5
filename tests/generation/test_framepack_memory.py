"""Plans of FramePack's generation: what a section is predicted to take is what it counts when it really
runs.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from fpack_generate_video import DEFAULTS
from frame_pack.family import LATENT, FramePack, family_for_generation
from frame_pack.options import FramePackGenerationOptions
from frame_pack.requests import FramePackRequest
from generation.denoise import SeededNoise, on_device, predictor
from generation.memory import rehearse_decoding, rehearse_denoising, resolve_options
from generation.options import GenerationOptions, generation_parser, read_arguments
from modules.contract.data import MediaEncoders
from modules.contract.loading import Placement
from modules.contract.requests import Request
from modules.contract.steps import EncodedPrompts, Step
from modules.errors import MemoryPlanError
from modules.options import read_options
from modules.parser import add_options
from modules.planning.dry_run import ACCELERATOR, HOST, WEIGHTS, Ledger
from modules.planning.kernels import PlannedKernels
from modules.planning.memory_plan import GIB, MemoryPart, Room
from tests.preparing import prepare
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.framepack_dit import CONFIG, tiny_state, write_dit

ROWS, COLUMNS, SECTIONS = 8, 12, 2


def text(tokens: int) -> dict[str, Any]:
    return {
        "llama_vec": torch.zeros(32, CONFIG.text_dim, dtype=torch.float16),
        "llama_attention_mask": torch.arange(32) < tokens,
        "clip_l_pooler": torch.zeros(CONFIG.pooled_dim, dtype=torch.float16),
    }


@pytest.mark.parametrize(
    "more",
    [(), ("--f1",), ("--rope_scaling_timestep_threshold", "900", "--guidance_rescale", "0.5")],
    ids=["anti-drifting", "f1", "scaled"],
)
def test_denoising_takes_what_was_predicted(tmp_path: Path, more: tuple[str, ...]) -> None:
    path = write_dit(tmp_path, tiny_state(dtype=torch.bfloat16, double_blocks=5, single_blocks=6))
    parser = generation_parser("", DEFAULTS)
    add_options(parser, FramePackGenerationOptions)
    args = read_arguments(
        parser, ["--dit", str(path), "--prompt", "x", "--save_path", str(tmp_path / "out"), *more]
    )
    options = read_options(GenerationOptions, args)
    family = family_for_generation(read_options(FramePackGenerationOptions, args))
    asked = Request(
        "x", 0, 8 * COLUMNS, 8 * ROWS, 4 * 9 * SECTIONS + 1, 4, 5.0, 10.0, 3.0, "unipc-bh1", 30.0, "y"
    )
    request = replace(prepare(asked), own=FramePackRequest((Path("start.png"),) * SECTIONS))
    encoded = {index: EncodedPrompts(text(20), text(11)) for index in range(SECTIONS)}
    image = {
        "image_embeddings": torch.zeros(1, 7, CONFIG.image_dim),
        "start_latents": torch.zeros(1, 16, 1, ROWS, COLUMNS),
    }
    inputs = dict.fromkeys(range(SECTIONS), image)

    phase, most = rehearse_denoising(family, options, request, encoded, inputs, MemoryPart("more", 0))

    dit = family.load_dit(Placement(HOST)).requires_grad_(False)
    section = on_device(next(family.sections(request, encoded, inputs, SeededNoise(0, HOST))), HOST)
    given = [section.noise, *(tensor for tensor in section.positive.values() if torch.is_tensor(tensor))]
    given += [tensor for tensor in (section.negative or {}).values() if torch.is_tensor(tensor)]
    with PlannedKernels(), Ledger(HOST) as ledger, torch.no_grad():
        for tensor in dit.parameters():
            ledger.see(tensor, WEIGHTS)
        for tensor in given:
            ledger.see(tensor)
        step = Step(0, 4, 1.0, 1000.0, section.noise)
        predict = predictor(family, lambda _: dit, step, options.split_uncond)
        make_guidance(request, options.guidance)(step, predict, section)
        real = max(sum(moment.values()) for moment in ledger.peaks.values())
    assert phase(0).device == pytest.approx(real, rel=0.02)
    assert most == 4  # both lists keep a block: 2 and 5 are swapped
    assert phase(most).device < phase(0).device


def made_for(folder: Path, *more: str) -> tuple[FramePack, GenerationOptions]:
    """A tiny family with all its files, and the options of a run on it."""
    files = write_tiny_framepack(folder / "models")
    parser = generation_parser("", DEFAULTS)
    add_options(parser, FramePackGenerationOptions)
    args = read_arguments(
        parser, [*files.models, "--latent_window_size", "2", "--save_path", str(folder / "out"), *more]
    )
    return family_for_generation(read_options(FramePackGenerationOptions, args)), read_options(
        GenerationOptions, args
    )


def test_a_conversation_may_begin_before_it_is_said_what_is_made(tmp_path: Path) -> None:
    """Images come with the lines; auto has to know before."""
    room = Room("some GPU", 8 * GIB, 8 * GIB)
    family, options = made_for(tmp_path, "--interactive")
    assert resolve_options(family, options, HOST, room) == (options, None)

    family, options = made_for(tmp_path, "--interactive", "--blocks_to_swap", "auto")
    with pytest.raises(
        MemoryPlanError, match="complete request on the command line: --image_path is missing"
    ):
        resolve_options(family, options, HOST, room)


class Decoding:
    """As much of a family as decoding needs; it yields chunks of so many frames."""

    latent = LATENT

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes, self.made = sizes, 0

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        return MediaEncoders(None)

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        for size in self.sizes:
            self.made += 1
            yield torch.empty(1, 3, size, 8, 8, device=ACCELERATOR)


@pytest.mark.parametrize(("sizes", "made"), [((1, 4, 4, 4, 4, 4), 4), ((40, 36, 36, 33), 1), ((1, 4), 2)])
def test_of_a_video_no_more_is_decoded_than_shows_what_decoding_holds(
    sizes: tuple[int, ...], made: int
) -> None:
    """FramePack's pieces are two sections each; a long video has many."""
    family: Any = Decoding(sizes)
    rehearse_decoding(family, Request("x", 0, 64, 64, 145), MemoryPart("more", 0))
    assert family.made == made
