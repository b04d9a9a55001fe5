"""Images that guide clips of LTX-2 in training: keyframes besides them, and in place of a latent frame."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dataset.batches.given_parts import add_clean_conditions
from dataset.config import load_dataset_config
from ltx_2.given import CleanLatentRules, ClipEndRule, insert_guides
from modules.errors import DatasetError
from tests.faults.messages import run_here
from tests.ltx_2.test_given import COLUMNS, FRAMES, ROWS, Guided, Shares, batch_of, check_steps
from tests.ltx_2.test_training import Heard, Project, read_items, write_project
from tests.parity.training import SEED, stream

KEYS = """keyframe_guide_directory = "{0}/identity"
keyframe_guide_cache_directory = "{0}/unneeded"
keyframe_guide_extra_directories = ["{0}/style"]
keyframe_guide_extra_frame_idxs = [5]
keyframe_guide_extra_strengths = [0.7]
latent_idx_guide_directory = "{0}/places"
latent_idx_guide_frame_idx = 1
latent_idx_guide_strength = 0.4
"""
FOLDERS = ("identity", "style", "places")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three clips of 17 frames, two with audio, each with three guides."""
    folder = tmp_path_factory.mktemp("größe 5")
    for place, name in enumerate(FOLDERS):
        (folder / name).mkdir()
        for number, clip in enumerate("abc"):
            color = (60 * place, 80 * number, 200 - 30 * number)
            Image.new("RGB", (80, 48), color).save(folder / name / f"{clip}.png")
    return write_project(folder, frames=17, more=KEYS.format(folder.as_posix()))


def cached(project: Project, name: str) -> list[Tensor]:
    """A guide of each clip, C 1 H W."""
    found = []
    for path in sorted((project.folder / "cache").glob("*_ltx2.safetensors")):
        tensors = load_file(path)
        found.append(next(tensor.float() for key, tensor in tensors.items() if key.startswith(name)))
    return found


@pytest.mark.slow
def test_steps_with_guides_equal_those_computed_with_diffusers(project: Project) -> None:
    """Keyframes before the first frame and, partly noisy, at frame 5; and one in place of a latent frame."""
    ways = [cached(project, name) for name in ("latents_keyframe_0", "latents_keyframe_1", "latents_guide")]
    items = read_items(project.folder / "cache")
    placed = []
    for item, latents in zip(items, ways[2], strict=True):
        placed.append(
            replace(item, latents=torch.cat([item.latents[:, :1], latents, item.latents[:, 2:]], 1))
        )
    by_text = {float(item.text.sum()): number for number, item in enumerate(items)}
    assert len(by_text) == len(items)

    def draw(step: int, batch: Sequence[Heard], length: int) -> list[Shares]:
        generator = stream(SEED, "given tokens", step)
        torch.rand((8, len(batch)), generator=generator)
        shape = (len(batch), len(ways[0][0]), 2, ROWS, COLUMNS)
        noise = torch.randn(shape, generator=generator)
        given = []
        for place, item in enumerate(batch):
            number = by_text[float(item.text.sum())]
            image = torch.zeros(FRAMES, ROWS, COLUMNS)
            image[1] = 0.4
            keyframes = tuple(
                Guided(way[number], frame, share, noise[place, :, index : index + 1])
                for index, (way, frame, share) in enumerate(zip(ways, (-1, 5), (1.0, 0.7), strict=False))
            )
            given.append(Shares(image, torch.zeros(length), guides=keyframes))
        return given

    check_steps(project, draw, items=placed)


def test_guides_are_given_in_their_shares_at_their_frames() -> None:
    names = ("latents_keyframe_0", "latents_keyframe_1", "latents_guide")
    tensors = {name: torch.full((2, 8, 1, 2, 3), number + 1.0) for number, name in enumerate(names)}
    tensors["guides"] = torch.tensor([[-1, 1000], [5, 700], [2, 400]]).expand(2, -1, -1)
    batch = batch_of(tensors=tensors)
    batch = replace(batch, tensors=insert_guides(batch.tensors, "", torch.Generator()))

    given = CleanLatentRules(ends=ClipEndRule(1, 1, 1, 1, True)).draw(batch, torch.Generator())

    assert batch.tensor("latents")[0, 0, :, 0, 0].tolist() == [0, 0, 3, 0]
    assert given is not None
    assert given.image is not None
    assert given.image[0, 0, :, 0, 0].tolist() == [1000, 0, 400, 1000]
    assert given.keyframes is not None
    assert given.keyframes[0, 0, :, 0, 0].tolist() == [1, 2]
    assert given.keyframe_indices == (-1, 5)
    assert given.keyframe_strengths is not None
    assert given.keyframe_strengths.unique(dim=0).tolist() == [[1000, 700]]
    assert given.keyframe_noise is not None
    behind = {**tensors, "guides": torch.tensor([[[-1, 1000], [5, 700], [4, 400]]])}
    with pytest.raises(DatasetError, match="has the latent frames 0 to 3"):
        CleanLatentRules().draw(batch_of(tensors=behind), torch.Generator())


def test_clips_and_caches_without_guides_are_named(project: Project, tmp_path: Path) -> None:
    text = (project.folder / "dataset.toml").read_text(encoding="utf-8")
    lacking = tmp_path / "lacking.toml"
    lacking.write_text(text.replace("/style", "/empty"), encoding="utf-8")
    (project.folder / "empty").mkdir()
    (project.folder / "empty" / "a.png").write_bytes((project.folder / "style" / "a.png").read_bytes())

    command = ["ltx2_cache_latents.py", *project.words, "--dataset_config", lacking]
    code, said = run_here(*command, folder=project.folder)

    assert code == 1, said
    assert "c.mp4 in" in said
    assert "clips without a guide" in said


def test_caches_without_guides_are_not_trained(project: Project) -> None:
    (table,) = load_dataset_config(project.folder / "dataset.toml").datasets
    item = SimpleNamespace(table=table.with_values(audio_cond_mask_directory=None))
    batch = batch_of(tensors={"latents_keyframe_0": torch.zeros(2, 8, 1, 2, 3)})

    with pytest.raises(DatasetError, match="its cache has 1 guides.* has 3. Cache again"):
        add_clean_conditions(batch, [item, item])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("keyframe_guide_strength = 0.5", "keyframe_guide_strength needs keyframe_guide_directory"),
        ("latent_idx_guide_frame_idx = 2", "needs latent_idx_guide_directory"),
        (
            'keyframe_guide_directory = "x"\nkeyframe_guide_extra_directories = ["y"]',
            "1 in keyframe_guide_extra_directories, 0 in keyframe_guide_extra_frame_idxs",
        ),
    ],
)
def test_keys_that_do_nothing_alone_are_refused(tmp_path: Path, keys: str, words: str) -> None:
    path = tmp_path / "data.toml"
    path.write_text(f'[[datasets]]\nvideo_directory = "v"\n{keys}\n', encoding="utf-8")

    with pytest.raises(DatasetError, match=words):
        load_dataset_config(path)
