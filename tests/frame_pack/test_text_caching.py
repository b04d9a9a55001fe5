"""fpack_cache_text_encoder_outputs.py as users run it, against transformers; and that training takes what it
makes.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.faults.messages import run_here
from tests.frame_pack.texts_there import TextsThere
from tests.tiny.framepack import TinyFramePack, write_tiny_framepack
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

    @property
    def encoders(self) -> list[str]:
        return [
            "--text_encoder1",
            str(self.files.text_encoder1),
            "--text_encoder2",
            str(self.files.text_encoder2),
        ]

    def run(self) -> tuple[int, str]:
        """The script on the clips, as a program of its own."""
        config = self.folder / "dataset.toml"
        return run_here(SCRIPT, "--dataset_config", config, *self.encoders, folder=self.folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("a project")
    files = write_tiny_framepack(folder / "models")
    write_clips(folder / "clips")
    write_dataset(folder, frames=str(4 * WINDOW + 1), batch_size=3)
    code, said = Project(folder, files).run()
    assert code == 0, said
    return Project(folder, files)


@pytest.fixture(scope="module")
def there(project: Project) -> TextsThere:
    return TextsThere(project.files.text_encoder1.parent, torch.float16)


def cache_file(folder: Path, index: int) -> Path:
    return folder / "cache" / f"clip {index}_fp_te.safetensors"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, with the library alone."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118 (it is no mapping)


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
