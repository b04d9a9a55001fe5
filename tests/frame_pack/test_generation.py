"""What the transformer is given in every section of a video, in both orders of making."""

from pathlib import Path
from typing import Any

import pytest
import torch

from frame_pack.family import FramePack
from frame_pack.files import FramePackFiles
from frame_pack.sections import video_frames
from tests.frame_pack.stubs import family, golden_videos, images, make, request
from tests.tiny.framepack_dit import tiny_state, write_dit

WINDOW = 9


def expected_places(video: dict[str, Any], is_f1: bool) -> dict[int, dict[str, Any]]:
    """What is recorded of calls, by their order; of long videos some."""
    if is_f1:
        return dict.fromkeys(range(video["total_sections"]), video["f1"])
    return {section["order"]: section for section in video["sections"]}


@pytest.mark.parametrize("is_f1", [False, True], ids=["anti-drifting", "f1"])
@pytest.mark.parametrize("video", golden_videos(), ids=lambda video: f"{video['total_sections']} sections")
def test_places_are_those_of_the_recorded_system(video: dict[str, Any], is_f1: bool) -> None:
    model = family(is_f1=is_f1, window=video["latent_window_size"])

    latents, calls = make(model, request(video["final_pixel_frames"]), images(video["total_sections"]))

    assert latents.shape[2] == video["final_latent_frames"]
    assert len(calls) == video["total_sections"]
    for order, expected in expected_places(video, is_f1).items():
        call = calls[order]
        assert call.image.unique().tolist() == [float(expected.get("section_index", order))]
        assert call.indices.tolist() == [list(_run(expected["latent_indices_first_last"]))]
        assert call.places("clean_latent_indices") == expected["clean_indices"]
        assert call.places("clean_latent_2x_indices") == list(_run(expected["clean_2x_first_last"]))
        assert call.places("clean_latent_4x_indices") == list(_run(expected["clean_4x_first_last"]))


def _run(ends: list[int]) -> range:
    return range(ends[0], ends[1] + 1)


def test_guidance_and_timesteps_are_rounded_to_what_the_transformer_computes_in(tmp_path: Path) -> None:
    """As the released code; a file in bfloat16 has steps of 16 at 3300 and of 4 at 750."""
    model = FramePack(FramePackFiles(dit=write_dit(tmp_path, tiny_state(dtype=torch.bfloat16))))
    _, calls = make(model, request(video_frames(1, WINDOW), embedded_guidance=3.3, steps=2), images(1))
    assert [call.guidance.item() for call in calls] == [3296.0, 3296.0]
    assert [call.timesteps.item() for call in calls] == [1000.0, 752.0]
