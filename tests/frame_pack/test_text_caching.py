"""fpack_cache_text_encoder_outputs.py as users run it, against transformers; and that training takes what it
makes.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dataset.batches.finding import CachingCommands, find_items, require_items
from dataset.batches.reading import read_batch
from dataset.cache.files import read_header
from dataset.cache.records import text_records
from dataset.config import load_dataset_config
from frame_pack.family import LATENT, TEXT_KEYS, FramePack
from frame_pack.files import FramePackFiles
from modules.contract.data import Batch
from modules.contract.loading import Placement
from modules.errors import CacheError
from tests.commands import ROOT, run_python
from tests.faults.messages import assert_one_message, run_here
from tests.faults.runs import DYING, assert_same_caches, assert_whole
from tests.frame_pack.texts_there import TextsThere
from tests.tiny.framepack import TinyFramePack, write_tiny_framepack
from tests.tiny.framepack_encoders import SIGLIP_DIM
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM
from tests.tiny.project import CAPTIONS, write_clips, write_dataset

SCRIPT = "fpack_cache_text_encoder_outputs.py"
KILLED = 1 if os.name == "nt" else -9
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


def test_the_record_names_both_encoders(project: Project) -> None:
    records = text_records(read_header(cache_file(project.folder, 2)))
    assert records.keys() == {"llama", "clip_l"}
    for record in records.values():
        assert record.caption == CAPTIONS[2]
        assert record.file is not None
        assert record.file.name == "clip 2.txt"


def test_the_same_command_again_encodes_nothing_and_leaves_the_files_alone(project: Project) -> None:
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (project.folder / "cache").iterdir()
    }
    code, said = project.run()
    assert code == 0, said
    assert "llama: 4 captions, 0 of them to encode" in said
    assert "clip_l: 4 captions, 0 of them to encode" in said
    assert "text encoder 1:" not in said  # which is said when it is loaded
    assert before == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (project.folder / "cache").iterdir()
    }


def test_checking_says_what_there_is_to_do_and_does_nothing(project: Project, tmp_path: Path) -> None:
    dataset = project.elsewhere(tmp_path, cached=False)
    code, said = project.run("--check", dataset=dataset)
    assert code == 0, said
    assert not (tmp_path / "cache").exists()


def test_a_changed_caption_is_encoded_alone(project: Project, tmp_path: Path, there: TextsThere) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(project.folder / "clips", folder / "clips", copy_function=shutil.copy2)
    shutil.copytree(project.folder / "cache", folder / "cache")
    dataset = write_dataset(folder, frames=str(4 * WINDOW + 1), batch_size=3)
    (folder / "clips" / "clip 1.txt").write_text("a cow", encoding="utf-8")
    code, said = project.run(dataset=dataset)
    assert code == 0, said
    assert "llama: 4 captions, 1 of them to encode" in said
    tensors, metadata = read(cache_file(folder, 1))
    assert metadata["caption1"] == "a cow"
    states = there.llama_vec("a cow")
    assert torch.equal(tensors["llama_vec_float16"][: len(states)], states)
    assert not tensors["llama_vec_float16"][len(states) :].any()
    for index in (0, 2, 3):
        assert cache_file(folder, index).read_bytes() == cache_file(project.folder, index).read_bytes()


def test_another_checkpoint_of_one_encoder_is_alone_in_encoding(project: Project, tmp_path: Path) -> None:
    """In 8 bits the language model gives other states; CLIP has no such option."""
    dataset = project.elsewhere(tmp_path, cached=True)
    code, said = project.run("--fp8_llm", dataset=dataset)
    assert code == 0, said
    assert "llama: 4 captions, 4 of them to encode" in said
    assert "clip_l: 4 captions, 0 of them to encode" in said
    for index in range(4):
        (now, _), (before, _) = read(cache_file(tmp_path, index)), read(cache_file(project.folder, index))
        assert now.keys() == before.keys()
        assert torch.equal(now["llama_attention_mask"], before["llama_attention_mask"])
        assert torch.equal(now["clip_l_pooler_float16"], before["clip_l_pooler_float16"])
        rows = before["llama_vec_float16"].float()
        # weights that are off by 2.25 %
        assert 1e-4 < (now["llama_vec_float16"].float() - rows).norm() / rows.norm() < 0.1
    code, said = project.run(dataset=dataset)
    assert code == 0, said
    assert_same_caches(tmp_path / "cache", project.folder / "cache")


@pytest.mark.parametrize("skip_existing", [False, True])
def test_files_of_other_programs_stay_where_that_is_asked_for(
    project: Project, tmp_path: Path, skip_existing: bool
) -> None:
    """That of clip 1 has another caption, so it is made again in any case; that of clip 2 lacks the second
    encoder's vector.
    """
    dataset = project.elsewhere(tmp_path, cached=False)
    foreign = as_known_tuners_write(cache_file(tmp_path, 0), CAPTIONS[0], 3.0)
    as_known_tuners_write(cache_file(tmp_path, 1), "another caption", 3.0)
    half = {name: foreign[name] for name in ("llama_vec_float16", "llama_attention_mask")}
    save_file(half, cache_file(tmp_path, 2), {**KNOWN, "caption1": CAPTIONS[2]})

    code, said = project.run(*(["--skip_existing"] if skip_existing else []), dataset=dataset)

    assert code == 0, said
    assert f"llama: 4 captions, {2 if skip_existing else 4} of them to encode" in said
    assert f"clip_l: 4 captions, {3 if skip_existing else 4} of them to encode" in said
    for index in range(4):
        tensors, metadata = read(cache_file(tmp_path, index))
        expected, _ = read(cache_file(project.folder, index))
        if skip_existing and index == 0:
            expected = foreign
        if skip_existing and index == 2:
            expected |= half
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected), index
        assert metadata["caption1"] == CAPTIONS[index]


@pytest.mark.parametrize(
    ("point", "count", "left", "encoded"),
    [("mid_write", 7, (0, 1), "2 of them"), ("before_rename", 6, (1, 2, 3), "0 of them")],
    ids=["first pass", "second pass"],
)
def test_a_run_that_is_killed_is_finished_by_the_same_command(
    project: Project, tmp_path: Path, point: str, count: int, left: tuple[int, ...], encoded: str
) -> None:
    """left: captions whose files are unfinished. encoded: how much of the first pass is done again.

    A file of the first pass has a header and two tensors. Each file of either pass takes one rename.
    """
    dataset = project.elsewhere(tmp_path, cached=False)
    command = [ROOT / SCRIPT, "--dataset_config", dataset, *project.encoders]
    killed = run_python(DYING, point, count, *command, folder=project.folder, check=False)
    assert killed.returncode == KILLED, killed.stderr[-3000:]
    assert_whole(tmp_path / "cache")
    unfinished = sorted(path.name for path in (tmp_path / "cache").glob("clip*.part"))
    assert unfinished == [f"clip {index}_fp_te.safetensors.part" for index in left]

    code, said = project.run(dataset=dataset)

    assert code == 0, said
    assert f"llama: 4 captions, {encoded} to encode" in said
    assert_same_caches(tmp_path / "cache", project.folder / "cache")


def test_wrong_files_are_refused_by_name(project: Project) -> None:
    files = project.files
    swapped = ["--text_encoder1", files.text_encoder2, "--text_encoder2", files.text_encoder1]
    for options, words in (
        (swapped, (files.text_encoder2, "--text_encoder1", "Llama language model")),
        (["--text_encoder2", files.dit], (files.dit, "--text_encoder2", "CLIP text encoder")),
        (["--text_encoder1", files.vae], (files.vae, "--text_encoder1", "Llama language model")),
        (["--text_encoder1", "nowhere"], ("nowhere", "--text_encoder1", "no such file or folder")),
        (
            ["--text_encoder1_tokenizer", files.text_encoder2.parent],
            ("--text_encoder1_tokenizer", "tokenizer.json"),
        ),
    ):
        before = {path: path.read_bytes() for path in (project.folder / "cache").iterdir()}
        code, said = project.run(*options)
        assert_one_message(code, said, *words, remedy="nowhere" not in words)
        assert before == {path: path.read_bytes() for path in (project.folder / "cache").iterdir()}


def test_both_encoders_have_to_be_named(project: Project) -> None:
    code, said = run_here(
        SCRIPT, "--dataset_config", "dataset.toml", *project.encoders[:2], folder=project.folder
    )
    assert code == 2
    assert "--text_encoder2" in said


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


@pytest.mark.parametrize(("name", "width"), [("llama_vec", LLM_DIM), ("clip_l_pooler", CLIP_DIM)])
def test_training_refuses_texts_of_another_encoder_by_name(project: Project, name: str, width: int) -> None:
    texts: dict[str, Tensor | list[Tensor]] = {
        "llama_vec": torch.zeros(1, 512, LLM_DIM),
        "llama_attention_mask": torch.ones(1, 512, dtype=torch.bool),
        "clip_l_pooler": torch.zeros(1, CLIP_DIM),
    }
    texts[name] = torch.zeros(*texts[name].shape[:-1], width + 8)  # type: ignore[union-attr]
    family = FramePack(FramePackFiles(dit=project.files.dit))
    with pytest.raises(
        CacheError, match=rf"an item: {name} in its cache is {width + 8} numbers wide.*{SCRIPT}"
    ):
        family.batch_conditions(torch.zeros(1, 16, WINDOW, 4, 4), Batch(texts, ("a cow",), ("an item",)))


def test_training_asks_for_the_second_half_of_a_text_cache(project: Project, tmp_path: Path) -> None:
    dataset = project.elsewhere(tmp_path, cached=True)
    write_section(tmp_path, "clip 0")
    tensors, metadata = read(cache_file(tmp_path, 0))
    half = {name: tensor for name, tensor in tensors.items() if not name.startswith("clip_l")}
    save_file(
        half,
        cache_file(tmp_path, 0),
        {key: text for key, text in metadata.items() if not key.startswith("reelsmith")},
    )
    items = require_items(find_items(load_dataset_config(dataset), "fp", LATENT, TEXT_KEYS))
    with pytest.raises(CacheError, match=rf"(?s)it has no clip_l_pooler.*python {SCRIPT}"):
        read_batch(items, LATENT, CachingCommands(text=f"python {SCRIPT}"))
