"""VACE's second stack beside the first: order, block swap, messages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.model_files import read_once
from generation.options import read_generation
from modules.errors import CheckpointError, OptionError
from protocols.requests import Request
from runtime.offload.block_swap import get_swap, swap_blocks
from runtime.offload.swap_plan import HostWeights, SwapPlan
from tests.faults.messages import assert_one_message, run_here
from tests.tiny.dits import dit_called
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.checkpoints import read_dit_header
from wan.options import WanGenerationOptions
from wan.spec import VACE_DIT
from wan.vace import read_scales, read_vace_request, split_comma_paths
from wan_generate_video import DEFAULTS

CPU = torch.device("cpu")
VACE_ASK = ["--task", "vace-1.3B", "--save_path", "made"]


def test_each_block_of_vace_runs_before_its_share_of_the_others() -> None:
    order = VACE_DIT.execution_order([40, 8])

    assert order[:8] == [40, 0, 1, 2, 3, 4, 41, 5]
    assert order[-6:] == [47, 35, 36, 37, 38, 39]
    assert VACE_DIT.execution_order([30, 15])[:5] == [30, 0, 1, 31, 2]


@pytest.mark.slow_cases("True")
@pytest.mark.parametrize("learns", [False, True])
def test_swapped_blocks_of_both_stacks_give_the_same_bits(learns: bool) -> None:
    tiny = dit_called("wan vace")
    inputs, found = tiny.inputs((2, 4, 6, 9), 2), []
    for blocks in (0, 6):
        dit = tiny.make((12, 4))
        if blocks:
            plan = SwapPlan(VACE_DIT, blocks)
            assert [len(each.streamed) > 0 for each in plan.lists(dit)] == [True, True]
            swap_blocks(dit, HostWeights(plan, pinned=False), CPU)
            assert get_swap(dit) is not None
        given = {**inputs, "control": inputs["control"].clone().requires_grad_(learns)}
        for _ in range(2):
            velocity = dit(**given)
            if learns:
                velocity.square().mean().backward()
        found.append((velocity.detach(), given["control"].grad))

    assert torch.equal(found[0][0], found[1][0])
    assert not learns or torch.equal(found[0][1], found[1][1])


def test_skipped_blocks_are_numbered_as_in_text_to_video(tmp_path: Path) -> None:
    files = write_tiny_wan(tmp_path / "models", "vace")
    skip = ["--slg_mode", "original", "--slg_layers", 4, "--prompt", "a cat", "--save_path", "made"]
    code, message = run_here(
        "wan_generate_video.py", *files.models, "--task", "vace-1.3B", *skip, folder=tmp_path
    )

    assert_one_message(code, message, "blocks 0 to 3", remedy=False)


@pytest.mark.parametrize(
    ("text", "found"), [("0.5", (0.5, 0.5)), ("1, 0", (1.0, 0.0)), ("1\n0.25", (1.0, 0.25))]
)
def test_strengths_are_one_number_or_one_a_layer(text: str, found: tuple[float, ...]) -> None:
    assert read_scales(text, 2) == found


@pytest.mark.parametrize("text", ["much", "nan", "1 2 3", "1000"])
def test_other_strengths_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--vace_scale"):
        read_scales(text, 2)


def test_references_are_divided_at_commas_unless_a_file_has_one(tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("a.png", "b.png", "c,d.png")]
    for path in names:
        path.touch()

    assert split_comma_paths([Path(f"{names[0]},{names[1]}"), names[2]]) == tuple(names)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"extra": {"src_mask": "m.png"}}, "Pass --src_video"),
        ({"control_images": tuple(map(Path, "abcdefghi"))}, "at most 8"),
    ],
)
def test_what_has_no_use_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        read_vace_request(Request("a cat", 1, **asked), 2)


def test_options_of_vace_are_refused_beside_other_tasks(tmp_path: Path) -> None:
    files = write_tiny_wan(tmp_path / "models")
    said = [*files.models, "--prompt", "a cat", "--save_path", "made", "--task", "t2v-1.3B"]
    fun, image = ["--task", "t2v-1.3B-FC", "--control_path", "clip.mp4"], ["--task", "i2v-14B"]
    for given in (
        ["--src_mask", "mask.png"],
        ["--vace", "vace.safetensors"],
        ["--src_video", "clip.mp4"],
        ["--vace_video", "clip.mp4"],
        ["--control_path", "clip.mp4"],
        ["--src_ref_images", "p.png", "q.png"],
        ["--vace_reference_image=p.png"],
        ["--src_ref_images", "p.png", *fun],
        ["--control_image_path", "p.png", *image],
        ["--src_video", "clip.mp4", *image, "--one_frame_inference", "default"],
    ):
        code, message = run_here("wan_generate_video.py", *said, *given, folder=tmp_path)
        assert_one_message(code, message, given[0].partition("=")[0], "vace-1.3B")
        is_of_one_frame = given[0] == "--control_image_path"
        assert ("does not use it without --one_frame_inference" in message) is is_of_one_frame


def test_other_spellings_of_the_clip_and_the_references() -> None:
    told = ["--vace_video", "clip.mp4", "--vace_reference_image", "p.png", "q.png", "--prompt", "a cat"]
    options, _ = read_generation(None, DEFAULTS, WanGenerationOptions, [*VACE_ASK, *told])

    assert options.request.control_path == Path("clip.mp4")
    assert options.request.control_image_path == ("p.png", "q.png")


def test_control_images_may_be_for_lines_that_ask_for_one_frame(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a cat --of default", encoding="utf-8")
    told = ["--task", "i2v-14B", "--control_image_path", "p.png", "--save_path", "made"]
    for lines in (["--from_file", str(tmp_path / "lines.txt")], ["--interactive"]):
        options, _ = read_generation(None, DEFAULTS, WanGenerationOptions, [*told, *lines])
        assert options.request.control_image_path == ("p.png",)


def test_blocks_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state("vace", num_layers=5), name="odd")

    with pytest.raises(CheckpointError, match="2 VACE blocks next to 5 blocks"):
        read_once(path, read_dit_header)


@pytest.mark.parametrize(("number", "is_rejected"), [(4, True), (30, False)])
def test_places_that_a_configuration_has_are_compared(tmp_path: Path, number: int, is_rejected: bool) -> None:
    """That of another model, in a folder of several, says nothing."""
    path = write_dit(tmp_path, tiny_state("vace"), "diffusers")
    said = {"num_layers": number, "vace_layers": [1, 3]}
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")

    if is_rejected:
        with pytest.raises(CheckpointError, match=r"vace_layers are \[1, 3\]; .* next to \[0, 2\]"):
            read_once(path, read_dit_header)
    else:
        assert read_once(path, read_dit_header).config.vace_layers == 2
