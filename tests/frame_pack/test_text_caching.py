"""fpack_cache_text_encoder_outputs.py as users run it, against transformers; and that training takes what it
makes.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dataset.batches.finding import find_items, require_items
from dataset.batches.reading import read_batch
from dataset.config import load_dataset_config
from frame_pack.family import LATENT, TEXT_KEYS, FramePack
from frame_pack.files import FramePackFiles
from modules.contract.loading import Placement
from tests.faults.messages import run_here
from tests.frame_pack.texts_there import TextsThere
from tests.tiny.framepack import TinyFramePack, write_tiny_framepack
from tests.tiny.framepack_encoders import SIGLIP_DIM
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM
from tests.tiny.project import CAPTIONS, write_clips, write_dataset

SCRIPT = "fpack_cache_text_encoder_outputs.py"
# metadata of the known tuners, beside the caption
KNOWN = {"architecture": "framepack", "format_version": "1.0.1"}
WINDOW = 9


@dataclass(frozen=True)
class Project:
    """A folder with models, clips with captions, and caches made by `command`."""

    folder: Path
    files: TinyFramePack
    said: str  # while the caches were made

    @property
    def encoders(self) -> list[str]:
        return [
            "--text_encoder1",
            str(self.files.text_encoder1),
            "--text_encoder2",
            str(self.files.text_encoder2),
        ]

    def run(self, *more: object, dataset: Path | None = None) -> tuple[int, str]:
        """The script on the clips, as a program of its own."""
        config = dataset or self.folder / "dataset.toml"
        return run_here(SCRIPT, "--dataset_config", config, *self.encoders, *more, folder=self.folder)

    def elsewhere(self, folder: Path, *, cached: bool) -> Path:
        """A configuration of the same clips with caches in `folder`, empty or a copy."""
        if cached:
            shutil.copytree(self.folder / "cache", folder / "cache")
        text = (self.folder / "dataset.toml").read_text(encoding="utf-8")
        place = 'cache_directory = "{}/cache"'
        path = folder / "dataset.toml"
        path.write_text(
            text.replace(place.format(self.folder.as_posix()), place.format(folder.as_posix())),
            encoding="utf-8",
        )
        return path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("a project")
    files = write_tiny_framepack(folder / "models")
    write_clips(folder / "clips")
    write_dataset(folder, frames=str(4 * WINDOW + 1), batch_size=3)
    code, said = Project(folder, files, "").run()
    assert code == 0, said
    return Project(folder, files, said)


@pytest.fixture(scope="module")
def there(project: Project) -> TextsThere:
    return TextsThere(project.files.text_encoder1.parent, torch.float16)


def cache_file(folder: Path, index: int) -> Path:
    return folder / "cache" / f"clip {index}_fp_te.safetensors"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, with the library alone."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118 (it is no mapping)


def as_known_tuners_write(path: Path, caption: str, number: float) -> dict[str, Tensor]:
    """A text cache without anything of ours in it. number: what its tensors hold."""
    mask = torch.arange(512) < 7
    tensors = {
        "llama_vec_float16": torch.where(mask[:, None], number, 0.0).expand(512, LLM_DIM).half().contiguous(),
        "llama_attention_mask": mask,
        "clip_l_pooler_float16": torch.full((CLIP_DIM,), number, dtype=torch.float16),
    }
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, {**KNOWN, "caption1": caption})
    return tensors


def test_the_files_are_those_of_the_known_tuners(project: Project) -> None:
    assert sorted((project.folder / "cache").iterdir()) == [
        cache_file(project.folder, index) for index in range(4)
    ]
    for index, caption in enumerate(CAPTIONS):
        tensors, metadata = read(cache_file(project.folder, index))
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
            "llama_vec_float16": (torch.float16, (512, LLM_DIM)),
            "llama_attention_mask": (torch.bool, (512,)),
            "clip_l_pooler_float16": (torch.float16, (CLIP_DIM,)),
        }
        assert {key: text for key, text in metadata.items() if not key.startswith("reelsmith")} == {
            **KNOWN,
            "caption1": caption,
        }


def test_their_numbers_are_those_of_transformers_to_the_last_bit(project: Project, there: TextsThere) -> None:
    """Captions are cached in batches of three; the release encodes each alone."""
    for index, caption in enumerate(CAPTIONS):
        tensors, _ = read(cache_file(project.folder, index))
        states = there.llama_vec(caption)
        assert int(tensors["llama_attention_mask"].sum()) == len(states) > 5
        assert torch.equal(tensors["llama_vec_float16"][: len(states)], states)
        assert torch.equal(tensors["clip_l_pooler_float16"], there.clip_l_pooler(caption))


# training


def write_section(folder: Path, stem: str) -> None:
    """The latents of a section, as the known tuners write them."""
    generator = torch.Generator().manual_seed(len(stem))
    tensors = {
        "latents_9x4x4_float32": torch.randn(16, WINDOW, 4, 4, generator=generator),
        "latent_indices_int64": torch.arange(1, 1 + WINDOW),
        "image_embeddings_float16": torch.randn(729, SIGLIP_DIM, generator=generator).half(),
    }
    places = iter(range(20, 40))
    for kind, index, frames in (
        ("clean", "clean_latent", 2),
        ("clean_2x", "clean_latent_2x", 2),
        ("clean_4x", "clean_latent_4x", 16),
    ):
        tensors[f"latents_{kind}_9x4x4_float32"] = torch.randn(16, frames, 4, 4, generator=generator)
        tensors[f"{index}_indices_int64"] = torch.tensor([next(places) for _ in range(frames)])
    sizes = {"width": "32", "height": "32", "frame_count": "37"}
    save_file(
        tensors, folder / "cache" / f"{stem}_00000-037-0000_0032x0032_fp.safetensors", {**KNOWN, **sizes}
    )


def velocity(folder: Path, dataset: Path, files: TinyFramePack) -> Mapping[str, Tensor]:
    """What the transformer makes of the cached items, by their names, two of them at once."""
    items = require_items(find_items(load_dataset_config(dataset), "fp", LATENT, TEXT_KEYS))
    assert [item.source_stem for item in items] == ["clip 0", "clip 1"]
    batch = read_batch(items, LATENT)
    family = FramePack(FramePackFiles(dit=files.dit))
    dit = family.load_dit(Placement(torch.device("cpu"))).eval()
    latents = LATENT.to_model(batch.tensor("latents"))
    with torch.no_grad():
        found = family.predict(
            dit, latents, torch.tensor([500.0, 100.0]), family.batch_conditions(latents, batch)
        )
    assert torch.isfinite(found).all()
    return dict(zip(batch.captions, found, strict=True))


def test_training_takes_caches_of_the_known_tuners_beside_ours(project: Project, tmp_path: Path) -> None:
    """One file has a record of ours, the other was written by hand; both have what the transformer needs."""
    dataset = project.elsewhere(tmp_path, cached=False)
    number = as_known_tuners_write(cache_file(tmp_path, 0), CAPTIONS[0], 0.5)
    shutil.copy(cache_file(project.folder, 1), tmp_path / "cache")
    for index in (0, 1):
        write_section(tmp_path, f"clip {index}")

    found = velocity(tmp_path, dataset, project.files)

    assert found.keys() == set(CAPTIONS[:2])
    items = require_items(find_items(load_dataset_config(dataset), "fp", LATENT, TEXT_KEYS))
    batch = read_batch(items, LATENT)
    ours, _ = read(cache_file(project.folder, 1))
    for key, name in (
        ("llama_vec", "llama_vec_float16"),
        ("llama_attention_mask", "llama_attention_mask"),
        ("clip_l_pooler", "clip_l_pooler_float16"),
    ):
        assert torch.equal(batch.tensor(key), torch.stack([number[name], ours[name]]))
    assert batch.tensor("llama_attention_mask").dtype == torch.bool

    as_known_tuners_write(cache_file(tmp_path, 0), CAPTIONS[0], -0.5)
    changed = velocity(tmp_path, dataset, project.files)
    assert not torch.equal(changed[CAPTIONS[0]], found[CAPTIONS[0]])
    torch.testing.assert_close(changed[CAPTIONS[1]], found[CAPTIONS[1]])
