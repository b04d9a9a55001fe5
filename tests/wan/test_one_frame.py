"""Tables and caches that one frame of Wan cannot learn from are refused before a step is made."""

import dataclasses

import pytest
import torch
from torch import Tensor

from modules.errors import CacheError, DatasetError
from protocols.data import FRAME_INDICES, Batch, MediaTable
from tests.tiny.wan_dit import CONFIGS
from wan.configs import TASKS
from wan.one_frame import batch_conditions, check_table, order_frames

TABLE = MediaTable("data.toml", "image", has_control=True)


def test_frames_stand_in_the_order_of_their_places() -> None:
    order = order_frames((4, 0), 1)
    assert (order.frame_positions, order.image_indices, order.target_index) == ((0, 1, 4), (1, -1, 0), 1)
    assert order_frames((), None).frame_positions == (0, 1)
    assert order_frames((-2,), -3).image_indices == (-1, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "video"}, "trains on images with control images"),
        ({"has_control": False}, "trains on images with control images"),
        ({"clean_indices": (0, 2, 4)}, "supports at most 2"),
        ({"clean_indices": (0, 5), "target_index": 5}, "fp_1f_target_index: .* both at 5"),
    ],
)
def test_tables_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(DatasetError, match=rf"^data\.toml: .*{words}"):
        check_table(dataclasses.replace(TABLE, **change), has_features=True)  # type: ignore[arg-type]


def test_a_model_without_features_takes_more_images() -> None:
    check_table(dataclasses.replace(TABLE, clean_indices=(0, 2, 4)), has_features=False)


def batch(rows: int = 257, places: Tensor | None = None) -> Batch:
    tensors: dict[str, Tensor | list[Tensor]] = {
        "t5": [torch.zeros(3, 32)] * 2,
        "latents_image": torch.zeros(2, 20, 2, 4, 4),
        "clip": torch.zeros(2, rows, 8),
        FRAME_INDICES: torch.tensor([[0, 1], [0, 1]]) if places is None else places,
    }
    return Batch(tensors, ("", ""), ("one", "two"))


@pytest.mark.parametrize(
    ("task", "kind", "given", "words"),
    [
        (
            "t2v-14B",
            "t2v",
            batch(),
            "cached with --one_frame.* Use --task i2v-14B, flf2v-14B or",
        ),
        ("flf2v-14B", "flf2v", batch(), "257 rows.* needs 514"),
        (
            "i2v-14B",
            "i2v",
            batch(places=torch.tensor([[0, 1], [0, 2]])),
            "one and two: .* batch_size = 1",
        ),
        ("i2v-14B", "i2v", batch(places=torch.tensor([[0], [0]])), "do not fit its latents"),
        ("i2v-14B", "i2v", batch(places=torch.zeros(2, 2)), "do not fit its latents"),
    ],
)
def test_caches_are_refused(task: str, kind: str, given: Batch, words: str) -> None:
    with pytest.raises(CacheError, match=words):
        batch_conditions(TASKS[task], CONFIGS[kind], given)


def test_features_of_two_images_may_have_an_axis_of_their_own() -> None:
    given = batch()
    apart = {**given.tensors, "clip": torch.arange(2 * 2 * 257 * 8.0).view(2, 2, 257, 8)}

    found = batch_conditions(TASKS["flf2v-14B"], CONFIGS["flf2v"], dataclasses.replace(given, tensors=apart))

    assert torch.equal(found["clip"], apart["clip"].view(2, 514, 8))  # type: ignore[arg-type, union-attr]
