"""The transformer of MiniMax-H3 against diffusers: layouts of files, conditions, places, pruned files."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.before_denoise import (
    MiniMaxH3PrepareLayoutStep,
    MiniMaxH3Ref2VAPrepareLayoutStep,
    patchify_video_latents,
)
from safetensors.torch import save_file
from torch import Tensor

from minimax_h3.configs import AUDIO
from minimax_h3.dit_checkpoints import load_dit, make_format
from minimax_h3.model import H3Condition, H3Model
from minimax_h3.positions import AudioPosition, ImageGrid, ImagePosition, last_frame_time
from protocols.loading import Placement
from tests.manifests import tensor_list, write_hollow
from tests.minimax_h3.tiny_dit import released, their_dit

CPU = torch.device("cpu")
EXACT = (
    2e-5  # float32, values up to 5; sums in another order, and cosines of times that differ in a last digit
)


def load(folder: Path, is_interleaved: bool = False, name: str = "h3 ä.safetensors") -> H3Model:
    path = folder / name
    save_file(released(their_dit().state_dict(), is_interleaved), path)
    return load_dit(path, Placement(CPU))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VIDEO = random(1, 24, 7, 6, 8, seed=1)
HEARD = random(1, 32, 2, 9, seed=2)
TEXT = random(1, 11, 24, seed=3)


def rows_of_audio(latents: Tensor) -> Tensor:
    """B 32 2 A as the rows that diffusers packs: the left channel first."""
    return latents[0].flatten(1).T


def theirs(
    layout: tuple[Any, ...],
    pictures: list[Tensor],
    audios: list[Tensor],
    times: list[float],
    time_of: Any,
) -> tuple[Tensor, Tensor]:
    """The outputs of diffusers' network. time_of: kind of rows -> index among the times, for each row."""
    places, tags, video, audio, text, *_ = layout
    with torch.no_grad():
        output = their_dit()(
            hidden_states=torch.cat([patchify_video_latents(part, (1, 2, 2)) for part in pictures])[None],
            audio_hidden_states=torch.cat([rows_of_audio(part) for part in audios])[None],
            encoder_hidden_states=TEXT,
            timestep=torch.tensor(times),
            timestep_indices=time_of,
            token_tags=tags,
            position_ids=places,
            video_indices=video,
            audio_indices=audio,
            text_indices=text,
        )
    return output.sample, output.audio_sample


def layout_of(shown: list[int], anchors: tuple[str, ...] = ()) -> tuple[Any, ...]:
    return MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.tensor(shown), 7, 6, 8, 9, (1, 2, 2), 2, audio_tag=AUDIO, video_tag=0, keyframe_anchors=anchors
    )


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Compare with the last rows of their outputs, which are those of what is learned."""
    images, audio = found
    rows = patchify_video_latents(images, (1, 2, 2))
    torch.testing.assert_close(rows, expected[0][0, -len(rows) :], atol=EXACT, rtol=EXACT)
    heard = rows_of_audio(audio)
    torch.testing.assert_close(heard, expected[1][0, -len(heard) :], atol=EXACT, rtol=EXACT)


def row_times(layout: tuple[Any, ...], conditions: int = 0) -> Tensor:
    """0 of pictures and text, 1 of sound, 2 of the first rows of pictures: conditions."""
    _, tags, video, *_ = layout
    indices = torch.zeros(len(tags), dtype=torch.long)
    indices[tags == AUDIO] = 1
    indices[video[:conditions]] = 2
    return indices


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_video_and_sound_are_those_of_diffusers(tmp_path: Path, is_interleaved: bool) -> None:
    name = "model-00001-of-00001.safetensors" if is_interleaved else "h3.safetensors"
    layout = layout_of([1] * 11)
    expected = theirs(layout, [VIDEO], [HEARD], [0.3, 0.6], row_times(layout))

    with torch.no_grad():
        found = load(tmp_path, is_interleaved, name)(VIDEO, HEARD, (0.3, 0.6), TEXT)

    check(found, expected)


def test_a_folder_of_diffusers_is_the_same_network(tmp_path: Path) -> None:
    their_dit().save_pretrained(tmp_path / "transformer")
    ours = load_dit(tmp_path / "transformer", Placement(CPU))
    same = load(tmp_path)

    assert ours.state_dict().keys() == same.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name


def test_the_layout_of_rows_can_be_given(tmp_path: Path) -> None:
    """A single file whose rows are interleaved, such as joined shards."""
    path = tmp_path / "joined.safetensors"
    save_file(released(their_dit().state_dict(), is_interleaved=True), path)

    ours = make_format("interleaved").load(path, Placement(CPU))

    name = "blocks.0.attn.qkv_proj.weight"
    assert torch.equal(ours.state_dict()[name], load(tmp_path).state_dict()[name])
    assert not torch.equal(load_dit(path, Placement(CPU)).state_dict()[name], ours.state_dict()[name])


def test_first_and_last_frame_stand_where_diffusers_has_them(tmp_path: Path) -> None:
    shown = [1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1]
    frames = [random(1, 24, 1, 6, 8, seed=seed) for seed in (4, 5)]
    layout = layout_of(shown, ("first", "last"))
    expected = theirs(layout, [*frames, VIDEO], [HEARD], [0.3, 0.6, 0.999], row_times(layout, conditions=24))
    grid = ImageGrid(1, 3, 4)
    starts = (11.0, last_frame_time(11.0, 7))
    conditions = [
        H3Condition(latents, ImagePosition(grid, start))
        for latents, start in zip(frames, starts, strict=True)
    ]

    with torch.no_grad():
        found = load(tmp_path)(
            VIDEO,
            HEARD,
            (0.3, 0.6),
            TEXT,
            is_image_token=[tag == 0 for tag in shown],
            conditions=conditions,
        )

    check(found, expected)


class Reference:
    """As diffusers' layout step reads it."""

    def __init__(self, kind: str, has_audio: bool = False) -> None:
        self.kind = kind
        self.has_audio = has_audio


def test_references_stand_on_the_clock_of_diffusers(tmp_path: Path) -> None:
    """A picture, a sound, and a video with its sound, one after another."""
    image, clip = random(1, 24, 1, 4, 6, seed=6), random(1, 24, 2, 6, 6, seed=7)
    alone, of_clip = random(1, 32, 2, 5, seed=8), random(1, 32, 2, 12, seed=9)
    layout = MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        torch.ones(11, dtype=torch.long),
        [Reference("image"), Reference("audio"), Reference("video", has_audio=True)],
        [image, clip],
        [rows_of_audio(alone), rows_of_audio(of_clip)],
        num_latent_frames=7,
        latent_height=6,
        latent_width=8,
        num_audio_latents=9,
        patch_size=(1, 2, 2),
        audio_channels=2,
        audio_tag=AUDIO,
        video_tag=0,
    )
    _, _, video, audio, *_ = layout
    indices = row_times(layout, conditions=6 + 18)
    indices[audio[: 10 + 24]] = 3
    expected = theirs(layout, [image, clip, VIDEO], [alone, of_clip, HEARD], [0.3, 0.6, 0.999, 1.0], indices)
    target, own = ImageGrid(7, 3, 4), ImageGrid(2, 3, 3)
    conditions = [
        H3Condition(image, ImagePosition(ImageGrid(1, 2, 3), 11.0)),
        H3Condition(alone, AudioPosition(5, 12.0, target)),
        H3Condition(of_clip, AudioPosition(12, 17.0, own)),
        H3Condition(clip, ImagePosition(own, 17.0)),
    ]

    with torch.no_grad():
        found = load(tmp_path)(VIDEO, HEARD, (0.3, 0.6), TEXT, start=29.0, conditions=conditions)

    check(found, expected)


def test_a_pruned_file_reads_its_times_from_a_table(tmp_path: Path) -> None:
    """Made of the network's own embedding at the table's times, it is the same network there."""
    full = load(tmp_path)
    tensors = released(their_dit().state_dict())
    times = torch.linspace(0, 1, 5)
    tensors["adaln_t_table"] = full._embed_timesteps(times.tolist(), CPU)
    for name in list(tensors):
        if name.startswith("time_embedder."):
            del tensors[name]
    save_file(tensors, tmp_path / "pruned.safetensors")
    pruned = load_dit(tmp_path / "pruned.safetensors", Placement(CPU))

    with torch.no_grad():
        expected = full(VIDEO, HEARD, (0.25, 0.75), TEXT)
        found = pruned(VIDEO, HEARD, (0.25, 0.75), TEXT)
        between = pruned._embed_timesteps([0.625], CPU)

    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=EXACT, rtol=EXACT)
    middle = (tensors["adaln_t_table"][2] + tensors["adaln_t_table"][3]) / 2
    torch.testing.assert_close(between[0], middle, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("manifest", ["minimax-h3-dit", "minimax-h3-dit-pruned", "minimax-h3-dit-diffusers"])
def test_the_released_files_fit(tmp_path: Path, manifest: str) -> None:
    path = write_hollow(tmp_path / "h3.safetensors", tensor_list(manifest))
    dit = load_dit(path, Placement(torch.device("meta")))
    config = dit.config
    assert (config.dim, config.num_heads, config.num_layers, config.frequencies) == (5376, 56, 50, 16)
    assert config.table_rows == (1025 if "pruned" in manifest else 0)
    assert numpy.prod(dit.blocks[0].adaln_proj["linear"].weight.shape) == 96768 * config.time_dim


@pytest.mark.parametrize("place", [0, 1], ids=["pictures", "audio"])
def test_times_are_embedded_in_float32_where_the_model_computes_in_bf16(tmp_path: Path, place: int) -> None:
    """Of 0.9009 bf16 makes 0.8984: the embedding is rounded, not the time."""
    model = load(tmp_path).bfloat16()
    times = [0.9009, 0.9009]
    rounded = list(times)
    rounded[place] = float(torch.tensor(times[place]).bfloat16())
    assert rounded != times

    with torch.no_grad():
        exact = model(VIDEO.bfloat16(), HEARD.bfloat16(), (times[0], times[1]), TEXT.bfloat16())
        other = model(VIDEO.bfloat16(), HEARD.bfloat16(), (rounded[0], rounded[1]), TEXT.bfloat16())

    assert not torch.equal(exact[place], other[place])
