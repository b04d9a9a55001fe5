"""The sections of FramePack against recorded tables, their documented numbers, and a video that is cut into
sections.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from frame_pack.configs import DIT
from frame_pack.family import HISTORY, FramePack, family_for_generation
from frame_pack.options import FramePackGenerationOptions, parse_section_texts
from frame_pack.sections import (
    ANTI_DRIFTING,
    F1,
    GenerationOrder,
    blend_overlaps,
    compute_flow_shift,
    count_sections,
    count_tokens,
    count_window_sections,
    parse_paddings,
    select_entry,
)
from modules.compile_options import Compilation
from modules.errors import OptionError
from modules.flow.schedule import make_schedule
from modules.script_options import parse_options
from protocols.data import Conditions
from runtime.compile import compile_blocks
from tests.frame_pack.making import tiny_inputs, tiny_model
from tests.golden_cases import read_case
from tests.tiny.framepack_dit import CONFIG

DESCRIPTION, TENSORS = read_case("framepack_schedule")


@pytest.mark.parametrize(
    ("sections", "given", "paddings"),
    [(4, "0,0", [0, 0, 1, 0]), (5, "1", [1, 2, 2, 1, 0]), (2, " 3, 2 ,1,0", [3, 2]), (3, "0,0,0", [0, 0, 0])],
)
def test_given_paddings_replace_the_first(sections: int, given: str, paddings: list[int]) -> None:
    assert [
        section.padding for section in ANTI_DRIFTING.plan_sections(sections, 9, parse_paddings(given))
    ] == paddings


def test_the_shortest_video_has_one_section() -> None:
    assert count_sections(0.01, 9) == 1


def test_a_training_video_shorter_than_a_section_has_none() -> None:
    assert [count_window_sections(frames, 9) for frames in (1, 9, 10, 18, 19)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({0: "first"}, ["first", "first", "first"]),
        ({0: "first", 1: "second"}, ["first", "second", "first"]),
        ({0: "first", -1: "end"}, ["first", "first", "end"]),
        # the index from the end wins
        ({0: "first", 2: "third", -1: "end", -3: "start"}, ["start", "first", "end"]),
    ],
)
def test_each_section_finds_its_entry(entries: dict[int, str], found: list[str]) -> None:
    assert [select_entry(entries, index, 3) for index in range(3)] == found


# The flow shift


@pytest.mark.parametrize(
    ("size", "shift"),
    [
        ((9, 60, 104), 7.0),
        ((9, 20_000, 20_000), 7.0),  # whose exponential no number holds
        ((1, 64, 96), 2.0476),
    ],
)
def test_flow_shift_follows_the_number_of_tokens(size: tuple[int, int, int], shift: float) -> None:
    # as many digits as are documented
    assert compute_flow_shift(count_tokens(*size)) == pytest.approx(shift, rel=5e-5)


@pytest.mark.parametrize("case", DESCRIPTION["sampler_cases"], ids=lambda case: str(case["latent"]))
def test_noise_levels_are_those_recorded(case: dict[str, Any]) -> None:
    tokens = count_tokens(*case["latent"])
    assert tokens == case["seq_len"]
    assert torch.tensor(compute_flow_shift(tokens)).log().item() == pytest.approx(case["mu"], abs=1e-6)

    sigmas = make_schedule("unipc-bh1", case["steps"], compute_flow_shift(tokens)).sigmas

    name = f"lat{'x'.join(map(str, case['latent']))}_steps{case['steps']}.sigmas"
    assert (sigmas - TENSORS[name]).abs().max() <= DESCRIPTION["tolerance"]["sigmas"]["atol"]


# Decoding


def test_clips_are_taken_one_by_one_and_given_on_before_the_next() -> None:
    taken: list[int] = []

    def clips() -> Any:
        for number in range(3):
            taken.append(number)
            yield torch.zeros(1, 1, 5, 1, 1)

    pieces = blend_overlaps(clips(), 2)
    next(pieces)
    assert taken == [0]
    next(pieces)
    assert taken == [0, 1]


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a cat", {0: "a cat"}),
        ("1:a cat: it walks", {0: "1:a cat: it walks"}),  # without ;;; a colon is plain text
        ("0:a;;;1:b;;;-1:c", {0: "a", 1: "b", -1: "c"}),
        ("0-2:a;;;3:b", {0: "a", 1: "a", 2: "a", 3: "b"}),
        ("0:a;;;1-2:b;;;2:c", {0: "a", 1: "b", 2: "c"}),  # the later counts
        (" 0 : a ;;; 1 : b ", {0: "a", 1: "b"}),
        ("3:c;;;2:b", {0: "b", 2: "b", 3: "c"}),  # no entry 0: the first from the start
        ("-1:c;;;-2:b", {0: "b", -1: "c", -2: "b"}),  # the furthest from the end
        ("a cat: it walks;;;1:b", {0: "a cat: it walks", 1: "b"}),
        (r"C:\a.png;;;-1:D:\b.png", {0: r"C:\a.png", -1: r"D:\b.png"}),
        ("--1:a;;;1:b", {0: "--1:a", 1: "b"}),
        ("0:a;;; ;;;", {0: "a"}),
        (";;;", {0: ""}),
        ("-1-1:a;;;0:b", {-1: "a", 0: "b", 1: "a"}),
    ],
)
def test_pieces_are_for_the_sections_they_name(text: str, entries: dict[int, str]) -> None:
    assert parse_section_texts(text, "--prompt") == entries


@pytest.mark.parametrize("text", ["3-1:a;;;0:b", "0-99999999:a;;;0:b"])
def test_ranges_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"--image_path: \d-\d+ is not a range of sections"):
        parse_section_texts(text, "--image_path")


INPUTS = tiny_inputs((7,))
NAMES = {"llama_vec": "llama", "llama_attention_mask": "llama_mask", "clip_l_pooler": "clip_l"}
NAMES |= {name: latents for name, (latents, _) in HISTORY.items()}
CONDITIONS: Conditions = {ours: INPUTS[theirs] for ours, theirs in NAMES.items()} | {
    name: value
    for name, value in INPUTS.items()
    if name in ("guidance", "image_embeddings") or name.endswith("indices")
}


def options(*words: str) -> FramePackGenerationOptions:
    (found,) = parse_options("", words, FramePackGenerationOptions)
    return found


def velocity(
    family: FramePack, dit: nn.Module, timestep: float, guidance: torch.dtype = torch.float32
) -> Tensor:
    conditions = {**CONDITIONS, "guidance": INPUTS["guidance"].to(guidance)}
    return family.predict(dit, INPUTS["noisy"], torch.tensor([timestep]), conditions)


def scaled(dit: nn.Module, timestep: float, factor: float, guidance: torch.dtype = torch.float32) -> Tensor:
    given: dict[str, Any] = INPUTS | {
        "timesteps": torch.tensor([timestep]),
        "guidance": INPUTS["guidance"].to(guidance).float(),
    }
    return dit(**given, position_scale=factor)


def test_positions_are_scaled_from_the_threshold_on() -> None:
    family, dit = family_for_generation(options("--rope_scaling_timestep_threshold", "800")), tiny_model()

    assert torch.equal(velocity(family, dit, 799.0), scaled(dit, 799.0, 1.0))
    assert torch.equal(velocity(family, dit, 800.0), scaled(dit, 800.0, 0.5))
    assert not torch.equal(scaled(dit, 800.0, 0.5), scaled(dit, 800.0, 1.0))
    family = family_for_generation(
        options("--rope_scaling_timestep_threshold", "800", "--rope_scaling_factor", "0.7")
    )
    assert torch.equal(velocity(family, dit, 900.0), scaled(dit, 900.0, 0.7))


SIZES = {"double_blocks": 2, "single_blocks": 3}
ONE = tiny_inputs((11,))  # one sample, of tokens enough to multiply in 8 bits
WINDOW = ONE["noisy"].shape[2]
COMPILED_NEAR = 1e-5  # of the largest value, float32: sums in another order


@pytest.fixture(params=[ANTI_DRIFTING, F1], ids=["anti-drifting", "f1"])
def sections(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What the transformer is given in each section of a video of five."""
    start = torch.randn(1, CONFIG.in_dim, 1, 6, 10, generator=torch.Generator().manual_seed(1))
    order: GenerationOrder = request.param
    history, found = order.start_history(start, None), []
    for section in order.plan_sections(5, WINDOW, ()):
        seen, places = order.clean_latents(start, history), section.indices
        found.append(
            ONE
            | {
                "latent_indices": torch.tensor([places.target]),
                "clean_latents": seen.clean,
                "clean_latent_indices": torch.tensor([places.clean]),
                "clean_latents_2x": seen.clean_2x,
                "clean_latent_2x_indices": torch.tensor([places.clean_2x]),
                "clean_latents_4x": seen.clean_4x,
                "clean_latent_4x_indices": torch.tensor([places.clean_4x]),
            }
        )
        history = order.add_to_history(history, ONE["noisy"])
    return found


@pytest.mark.slow_cases("anti-drifting")
@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_blocks_of_each_list_share_one_compilation_in_all_sections(
    sections: list[dict[str, Any]],
) -> None:
    dit = tiny_model(**SIZES)
    with torch.no_grad():
        expected = [dit(**inputs) for inputs in sections]
        compile_blocks(dit, DIT, Compilation("eager", fullgraph=True))

        found = [dit(**inputs) for inputs in sections]

    assert counters["stats"]["unique_graphs"] == len(DIT.block_lists) == 2
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= COMPILED_NEAR * other.abs().max()
