"""FLUX.1 Kontext: the network with references, what becomes of them, caches of the known tuner, refusals."""

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from safetensors.torch import load_file

from flux.family import Flux
from flux.files import FluxFiles
from flux.kontext.family import TRAINED_SIZES, Kontext, KontextFiles
from generation.denoise import SeededNoise
from generation.expert_memory import find_largest
from modules.errors import CacheError, OptionError
from protocols.data import Batch
from protocols.requests import Request
from protocols.steps import Overrides
from tests.faults.messages import succeed_here
from tests.flux.making import in_diffusers, run_there, tiny_inputs, tiny_model
from tests.foreign_caches import train_with_and_without_records
from tests.tiny.families import family_called
from tests.tiny.flux import tiny_state, write_dit
from tests.tiny.project import write_image

NEAR = 1e-5  # of the largest value: the same formulas in float32, summed in another order


@pytest.mark.parametrize(("sizes", "masked"), [([(4, 10)], False), ([(6, 8), (2, 4)], True)], ids=str)
def test_references_of_any_size_are_seen_as_in_diffusers(sizes: list[tuple[int, int]], masked: bool) -> None:
    inputs, there = tiny_inputs("dev"), in_diffusers("dev")
    inputs = inputs if masked else inputs | {"t5_mask": None}
    generator = torch.Generator().manual_seed(3)
    references = [torch.randn(2, 16, 1, *size, generator=generator) for size in sizes]

    velocity = tiny_model("dev")(**inputs, references=references)

    expected = torch.cat([run_there(there, inputs, sample, references) for sample in range(2)])
    assert velocity.shape == inputs["noisy"].shape
    assert (velocity - expected).abs().max() <= NEAR * expected.abs().max()
    assert (velocity - tiny_model("dev")(**inputs)).abs().max() > 0.01 * expected.abs().max()


def test_a_skipped_block_passes_references_through() -> None:
    inputs = tiny_inputs("dev") | {"overrides": Overrides(skip_blocks=frozenset(range(5)))}
    model = tiny_model("dev")

    velocity = model(**inputs, references=[torch.ones(2, 16, 1, 4, 4)])

    assert torch.equal(velocity, model(**inputs))  # no block, so nothing is seen


def family_of(folder: Path, kind: str = "dev") -> Kontext:
    return Kontext(KontextFiles(write_dit(folder, tiny_state(kind))))


def test_a_reference_gets_the_trained_size_that_diffusers_takes(tmp_path: Path) -> None:
    assert list(TRAINED_SIZES) == PREFERRED_KONTEXT_RESOLUTIONS
    family, path = family_of(tmp_path), tmp_path / "before.png"
    pixels = numpy.random.default_rng(1).integers(0, 256, (75, 131, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(path)

    stretched = family._read_reference(path)
    own = replace(family, resizes_references=False)._read_reference(path)

    expected = Image.fromarray(pixels).resize((1328, 800), Image.Resampling.LANCZOS)
    assert torch.equal(stretched[0, 0], torch.from_numpy(numpy.array(expected)))
    assert torch.equal(own[0, 0], torch.from_numpy(pixels[:64, :128].copy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_seed_gives_the_noise_of_the_known_tuner(tmp_path: Path, dtype: torch.dtype) -> None:
    """Tokens in float32, channels first, then the rows and columns of a patch; in FLUX.1 as its file is."""
    kontext = Kontext(KontextFiles(write_dit(tmp_path, tiny_state("dev"), dtype=dtype)))
    flux = Flux(FluxFiles(kontext.files.dit))
    prepared = kontext.prepare(Request("p", 5, 48, 32))

    found = [one.draw_noise(prepared, SeededNoise(5, torch.device("cpu"))) for one in (kontext, flux)]

    for noise, drawn_in in zip(found, (torch.float32, dtype), strict=True):
        tokens = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(5), dtype=drawn_in).float()
        expected = tokens.view(2, 3, 16, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 16, 1, 4, 6)
        assert torch.equal(noise, expected)


def test_a_plan_is_made_of_the_request_with_the_largest_reference(tmp_path: Path) -> None:
    family, start = family_of(tmp_path), Request("p", 1, 48, 48)
    for side in (32, 96):
        write_image(tmp_path / f"{side}.png", side, side)
    of_small, of_large = (replace(start, control_images=(tmp_path / f"{side}.png",)) for side in (32, 96))
    smaller = replace(of_large, width=32)

    def planned(*requests: Request) -> list[Request]:
        return [
            one.request for one in find_largest(family, [family.prepare(request) for request in requests])
        ]

    assert planned(of_large, of_small, start) == [of_large]
    assert planned(start, smaller) == [start, smaller]  # a rehearsal shows which needs more


def test_caches_of_the_known_tuner_are_trained_on_as_they_are(tmp_path: Path) -> None:
    """One picture has no reference."""
    family = family_called("kontext")
    family.prepare(tmp_path)
    write_image(tmp_path / "control" / "picture 0.png", 70, 80)
    (tmp_path / "control" / "picture 3.png").unlink()

    found = train_with_and_without_records(family, tmp_path, "flux_kontext")

    shapes = {name[:9]: one for name, one in found.items() if not name.endswith("_te.safetensors")}
    target = {"latents_1x6x6_float32": (16, 6, 6)}
    assert shapes["picture 0"] == target | {"latents_control_1x10x8_float32": (16, 10, 8)}
    assert shapes["picture 1"] == target | {"latents_control_1x6x6_float32": (16, 6, 6)}
    assert shapes["picture 3"] == target


def test_a_network_without_the_reference_learns_from_the_model_with_it(tmp_path: Path) -> None:
    """At weight 1 all of the loss is the distance to the frozen model, here if both are told the same: 0."""
    family = family_called("kontext")
    family.prepare(tmp_path)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    run = ("--max_train_steps", "1", "--seed", "1", "--max_data_loader_n_workers", "0", "--output_dir", "out")
    teacher = (*run, "--teacher", "base", "--teacher_weight", "1", "--output_name")

    def learns(name: str) -> bool:
        succeed_here(*family.train, *teacher, name, folder=tmp_path)
        tensors = load_file(tmp_path / "out" / f"{name}.safetensors")
        return any(tensor.any() for key, tensor in tensors.items() if "lora_up" in key)

    assert not learns("same")
    with (tmp_path / "dataset.toml").open("a", encoding="utf-8") as file:
        file.write("reference_dropout_rate = 1.0\n")
    assert learns("without")


def test_a_batch_needs_its_texts_and_a_reference_that_is_one(tmp_path: Path) -> None:
    family, latents = family_of(tmp_path), torch.zeros(1, 16, 1, 4, 4)
    texts = {"t5_vec": torch.zeros(1, 8, 48), "clip_l_pooler": torch.zeros(1, 24)}
    wrong = {**texts, "latents_control": torch.zeros(1, 16, 1, 3, 4)}

    found = family.batch_conditions(latents, Batch({**texts, "latents_control": latents}, ("",), ("a",)))
    assert torch.equal(found["guidance"], torch.ones(1))
    assert found["latents_control"] is latents
    with pytest.raises(CacheError, match=r"a: the cache has no clip_l_pooler.*flux_kontext_cache_text"):
        family.batch_conditions(latents, Batch({"t5_vec": texts["t5_vec"]}, ("",), ("a",)))
    with pytest.raises(CacheError, match=r"a: latents_control in its cache is 16x1x3x4.*flux_kontext_cache_"):
        family.batch_conditions(latents, Batch(wrong, ("",), ("a",)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none.png"], r"--control_image_path .*none.png: no such file"),
        (["text.png"], r"--control_image_path: .*text.png is not an image.*Pass an image file"),
        (["."], r"--control_image_path: .*Pass an image file"),
        (["dot.png"], r"dot.png: 1 x 1 pixels are too few, each side needs at least 16"),
        (["huge.png"], r"huge.png has more than 134 million pixels, which is the limit. Make the image sm"),
        (["good.png", "good.png"], r"2 reference images, .* takes 1 at most. Omit .*good.png"),
    ],
)
def test_a_reference_that_cannot_be_used_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "text.png").write_text("a cat", encoding="utf-8")
    for name, size in {"dot": (1, 1), "good": (32, 32), "huge": (20000, 10000)}.items():
        Image.new("1", size).save(tmp_path / f"{name}.png")
    request = Request("p", 1, 32, 32, control_images=tuple(tmp_path / name for name in names))

    with pytest.raises(OptionError, match=message):
        family_of(tmp_path).prepare(request)


@pytest.mark.parametrize(("kind", "called"), [("schnell", "FLUX.1 schnell"), ("chroma", "Chroma")])
def test_another_kind_of_transformer_is_refused(tmp_path: Path, kind: str, called: str) -> None:
    with pytest.raises(OptionError, match=rf"a {called} transformer; FLUX.1 Kontext is a FLUX.1 dev"):
        family_of(tmp_path, kind).prepare(Request("p", 1, 32, 32))
