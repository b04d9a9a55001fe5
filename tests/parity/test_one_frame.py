"""Single pictures of Wan's image-to-video models: diffusers' transformer with the places of one frame.

There frames are counted; here its table of positions is cut to the frames that stand at the places, which is
all that one frame changes in the network.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dataset.batches.finding import find_items, with_reference_sizes
from dataset.cache.store import Stores
from dataset.config import load_dataset_config
from modules.media.reading import read_image
from modules.media.writing import write_png
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.parity.reference import Inputs, Sampling, covering, denoise, features_of, to_pixels
from tests.parity.running import TOLERANCE, assert_equal, generate, latents_in, models_in
from tests.parity.test_training import RATE, by_sigma, draw
from tests.parity.theirs import Theirs
from tests.parity.training import (
    ALPHA,
    RANK,
    Item,
    assert_descent,
    descent,
    linear_modules,
    loss_and_gradients,
    shuffled,
)
from tests.tiny.wan import write_tiny_wan
from training.planning.memory import largest_batch
from wan.spec import LATENT

WIDTH, HEIGHT, SEED = 48, 32, 12
ASK: list[object] = ["--prompt", "a cat", "--negative_prompt", "dull", "--seed", SEED, "--flow_shift", 3]
ASK += ["--video_size", HEIGHT, WIDTH, "--infer_steps", 3]
TASKS = {"i2v": "i2v-14B", "flf2v": "flf2v-14B", "i2v-2.2": "i2v-A14B"}
DATASET = """
[[datasets]]
image_directory = "pictures"
control_directory = "control"
cache_directory = "cache"
resolution = [48, 32]
batch_size = 2
caption_extension = ".txt"
fp_1f_clean_indices = [{controls}]
fp_1f_target_index = 1
fp_1f_no_post = true
"""


class Placed(nn.Module):
    """Positions of frames at these places, cut out of counted ones."""

    def __init__(self, rope: Any, places: Sequence[int]) -> None:
        super().__init__()
        self.rope, self.places = rope, list(places)

    def forward(self, noisy: Tensor) -> tuple[Tensor, ...]:
        frames, rows, columns = max(self.places) + 1, noisy.shape[3] // 2, noisy.shape[4] // 2
        longer = noisy.new_zeros(*noisy.shape[:2], frames, *noisy.shape[3:])
        return tuple(
            table.view(1, frames, rows * columns, 1, -1)[:, self.places].flatten(1, 2)
            for table in self.rope(longer)
        )


class Scene:
    """Models of a kind, and pictures that are larger than what is made, or of another shape."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.models, self.task = folder, folder / "models", TASKS[kind]
        write_tiny_wan(self.models, kind)
        self.theirs = Theirs(self.models)
        random = numpy.random.default_rng(3)
        for name, rows, columns in (("a", 40, 96), ("b", 32, 48)):
            write_png(folder / f"{name}.png", random.integers(0, 256, (rows, columns, 3), dtype=numpy.uint8))

    def picture(self, name: str) -> numpy.ndarray:
        return read_image(self.folder / f"{name}.png")

    def encode(self, name: str) -> Tensor:
        return self.theirs.encode(to_pixels([covering(self.picture(name), HEIGHT, WIDTH)]))[0]

    def made(self, places: Sequence[int], names: Sequence[str | None], seen: Sequence[str]) -> Tensor:
        """The latent of the picture. names: at each place, None for the picture. seen: by CLIP."""
        gray = self.theirs.encode(torch.zeros(1, 3, 1, HEIGHT, WIDTH))[0]
        frames = [torch.cat([torch.zeros(4, *gray.shape[1:]), gray]) for _ in names]
        for index, name in enumerate(names):
            if name is not None:
                frames[index] = torch.cat([torch.ones(4, *gray.shape[1:]), self.encode(name)])
        generator = torch.Generator("cpu").manual_seed(SEED)
        inputs = Inputs(
            torch.randn(16, len(names), HEIGHT // 8, WIDTH // 8, generator=generator),
            *(self.theirs.text("a cat"), self.theirs.text("dull")),
            clip=self.features(seen),
            extra=torch.cat(frames, dim=1),
        )
        scale = 3.5 if self.task == "i2v-A14B" else 5.0
        latents = denoise(self.dit(places), inputs, Sampling(flow_shift=3.0, scales=(scale,) * 3))
        slot = list(names).index(None)
        return latents[:, slot : slot + 1]

    def features(self, seen: Sequence[str]) -> Tensor | None:
        """Of all images in a row; the network of first and last frames takes them one by one."""
        if not seen:
            return None
        features = features_of(self.theirs, *map(self.picture, seen))
        return features if self.task == "flf2v-14B" else features.flatten(0, 1)[None]

    def dit(self, places: Sequence[int]) -> Any:
        dit = Theirs(self.models).dit
        dit.rope = Placed(dit.rope, places)
        return dit


@pytest.fixture(scope="module", params=TASKS)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("one frame"), request.param)


@pytest.mark.slow_cases("flf2v", "i2v-2.2")
def test_a_picture_equals_that_of_diffusers_at_these_places(tmp_path: Path, scene: Scene) -> None:
    """The images are given in a different order than their places; both are seen by models of Wan2.1."""
    one, two = scene.folder / "a.png", scene.folder / "b.png"
    words = ["--control_image_path", two, one, "--one_frame_inference", "target_index=1,control_index=4;0"]
    seen = [] if scene.task == "i2v-A14B" else ["--image_path", one, "--end_image_path", two]

    latents = generate(tmp_path, scene.models, scene.task, *ASK, *words, *seen)

    assert latents.shape == (16, 1, HEIGHT // 8, WIDTH // 8)
    expected = scene.made((0, 1, 4), ("a", None, "b"), ["a", "b"] if seen else [])
    assert_equal(latents, expected, scene.task)
    # what it would be with counted frames
    counted = scene.made((0, 1, 2), ("a", None, "b"), ["a", "b"] if seen else [])
    assert (counted - expected).abs().max() > 10 * TOLERANCE * expected.abs().max()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("one control"), "i2v")


def test_one_control_image_needs_no_more_words_and_makes_a_png(tmp_path: Path, start: Scene) -> None:
    """Its features are those of the control image."""
    words = ["--control_image_path", start.folder / "a.png", "--one_frame_inference", "default"]
    generate(tmp_path, start.models, start.task, *ASK, *words, "--output_type", "latent_images")

    made = tmp_path / "made"
    assert_equal(latents_in(made), start.made((0, 1), ("a", None), ["a"]), "default")
    (image,) = made.glob("*/*.png")
    assert read_image(image).shape == (HEIGHT, WIDTH, 3)


def test_lines_have_places_and_images_too(tmp_path: Path, start: Scene) -> None:
    image = start.folder / "a.png"
    lines = f"a cat --d {SEED} --n dull --ci {image} --of target_index=7,control_index=2"
    (tmp_path / "lines.txt").write_text(lines, encoding="utf-8")
    generate(tmp_path, start.models, start.task, *ASK[6:], "--from_file", "lines.txt")

    assert_equal(latents_in(tmp_path / "made"), start.made((2, 7), ("a", None), ["a"]), "line")


REJECTED = {
    "no image": (["--one_frame_inference", "default"], "--control_image_path"),
    "fewer places": (["--one_frame_inference", "control_index=0", "TWO"], "2 control images"),
    "one place": (["--one_frame_inference", "target_index=0", "ONE"], "both at 0"),
    "a word": (["--one_frame_inference", "soon", "ONE"], "'soon' is unknown"),
    "empty": (["--one_frame_inference", " ", "ONE"], "is empty"),
    "a mask": (["--one_frame_inference", "default", "ONE", "--control_image_mask_path", "a.png"], "masks"),
    "text to video": (["--one_frame_inference", "default", "ONE", "--task", "t2v-14B"], "--task i2v-14B"),
    "another start": (["--one_frame_inference", "default", "ONE", "--video_path", "a.png"], "--video_path"),
    "no file": (["--one_frame_inference", "default", "--control_image_path", "none.png"], "none.png"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_cannot_be_is_refused(start: Scene, case: str) -> None:
    words, message = REJECTED[case]
    given = {"ONE": ["--control_image_path", "a.png"], "TWO": ["--control_image_path", "a.png", "b.png"]}
    options = [one for word in words for one in given.get(word, [word])]
    models = models_in(start.models)
    task = [] if "--task" in options else ["--task", "i2v-14B"]
    code, said = run_here(
        "wan_generate_video.py", *models, *task, *ASK, "--save_path", "made", *options, folder=start.folder
    )
    assert_one_message(code, said, message)


# caching and training


def write_project(folder: Path, scene: Scene, controls: int) -> None:
    """Two pictures with so many control images each, and their caches."""
    random = numpy.random.default_rng(5)
    for name in ("pictures", "control"):
        (folder / name).mkdir()
    for item in ("a", "b"):
        names = ["pictures/{}", "control/{}", "control/{}_0"][: 1 + controls]
        for name in names:
            pixels = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=numpy.uint8)
            write_png(folder / f"{name.format(item)}.png", pixels)
        (folder / "pictures" / f"{item}.txt").write_text(f"picture {item}", encoding="utf-8")
    places = ", ".join(["0", "4"][:controls])
    (folder / "dataset.toml").write_text(DATASET.format(controls=places), encoding="utf-8")
    sees = ["--i2v"] if scene.task == "i2v-A14B" else ["--clip", scene.models / "clip.safetensors"]
    vae = ["--vae", scene.models / "vae.safetensors", "--vae_dtype", "float32", "--device", "cpu"]
    data = ["--dataset_config", "dataset.toml"]
    succeed_here("wan_cache_latents.py", *data, *vae, *sees, "--one_frame", folder=folder)
    texts = ["--t5", scene.models / "t5.safetensors", "--device", "cpu"]
    succeed_here("wan_cache_text_encoder_outputs.py", *data, *texts, folder=folder)


def cached(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of an item, without sizes and dtypes in their names."""
    (path,) = (folder / "cache").glob(f"{name}_*_wan.safetensors")
    return {
        key.rsplit("_", 2)[0] if key.startswith("latents") else key.rsplit("_", 1)[0]: tensor
        for key, tensor in load_file(path).items()
    }


def expected_item(folder: Path, scene: Scene, name: str, controls: int) -> Item:
    theirs = scene.theirs

    def pixels(file: str) -> Tensor:
        return to_pixels([read_image(folder / f"{file}.png")])

    images = [pixels(f"control/{name}{end}") for end in ("", "_0")[:controls]]
    frames = [theirs.encode(one)[0] for one in images]
    target = theirs.encode(pixels(f"pictures/{name}"))[0]
    gray = theirs.encode(torch.zeros_like(images[0]))[0]
    known, unknown = torch.ones(4, 1, *gray.shape[2:]), torch.zeros(4, 1, *gray.shape[2:])
    mask = torch.cat([known, unknown, known][: 1 + controls], dim=1)
    shown = torch.cat([frames[0], gray, *frames[1:]], dim=1)
    clip = [theirs.image_features(one[:, :, 0])[0] for one in images]
    (text,) = load_file(next((folder / "cache").glob(f"{name}_*wan_te.safetensors"))).values()
    return Item(
        torch.cat([frames[0], target, *frames[1:]], dim=1),
        text.float(),
        None if scene.task == "i2v-A14B" else torch.cat(clip),
        torch.cat([mask, shown]),
    )


@pytest.mark.slow_cases("flf2v", "i2v-2.2")
def test_the_first_steps_are_those_of_plain_torch(tmp_path: Path, scene: Scene) -> None:
    """One control image of an image-to-video model, two of the others."""
    controls = 1 if scene.task == "i2v-14B" else 2
    write_project(tmp_path, scene, controls)
    places, items = (0, 1, 4)[: 1 + controls], []
    for name in ("a", "b"):
        found, item = cached(tmp_path, name), expected_item(tmp_path, scene, name, controls)
        assert found["f_indices"].tolist() == list(places)
        assert found["f_indices"].dtype == torch.int32
        assert_equal(found["latents"], item.latents, "latents")
        assert item.extra is not None
        assert_equal(found["latents_image"], item.extra, "latents_image")
        if item.clip is not None:
            assert_equal(found["clip"], item.clip, "clip", 1e-3)  # stored as float16
        # from here on as cached, so that only training differs
        items.append(Item(found["latents"], item.text, found.get("clip", torch.empty(0)).float(), item.extra))
    if scene.task == "i2v-A14B":
        items = [Item(one.latents, one.text, None, one.extra) for one in items]

    models = ["--task", scene.task, "--dit", scene.models / "dit.safetensors", "--sdpa"]
    network = ["--network_module", "networks.lora_wan", "--network_dim", 4]
    data = ["--dataset_config", "dataset.toml"]
    succeed_here("wan_train_network.py", *models, *network, *data, *descent(RATE, 1), folder=tmp_path)

    dit, modules = scene.dit(places), linear_modules(scene.models / "dit.safetensors")
    batch = shuffled(items, epoch=0)
    assert_descent(
        [tmp_path / "out" / "lora.safetensors"],
        modules,
        RATE,
        lambda factors, step: loss_and_gradients(
            dit, modules, factors, ALPHA / RANK, batch, draw(batch, step, by_sigma)
        )[1],
        scene.task,
        TOLERANCE,
    )


def test_samples_are_pictures_and_caches_of_others_are_learned_from(tmp_path: Path, start: Scene) -> None:
    """Others hold features of each control image on an axis of their own; the same is learned from them."""
    write_project(tmp_path, start, 1)
    image = start.folder / "a.png"
    said = "--w 48 --h 32 --s 2 --d 1 --l 1"
    lines = f"a cat --ci {image} {said}\na dog --ci {image} --of target_index=5 {said} --f 1"
    (tmp_path / "lines.txt").write_text(lines, encoding="utf-8")
    run = ["--task", start.task, *models_in(start.models), "--sdpa", "--dataset_config", "dataset.toml"]
    run += ["--network_module", "networks.lora_wan", "--network_dim", 4, *descent(RATE, 1)]
    samples = ["--one_frame", "--sample_prompts", "lines.txt", "--sample_every_n_steps", 1]
    succeed_here("wan_train_network.py", *run, *samples, folder=tmp_path)

    folder = tmp_path / "out" / "sample"
    first, second = (next(folder.glob(f"lora_*_{number}_*.png")) for number in ("00", "01"))
    assert read_image(first).shape == (HEIGHT, WIDTH, 3)
    assert (read_image(first) != read_image(second)).any()
    trained = load_file(tmp_path / "out" / "lora.safetensors")

    for path in (tmp_path / "cache").glob("*_wan.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = {"architecture": file.metadata()["architecture"], "format_version": "1.0.1"}
        tensors = load_file(path)
        tensors = {key: one[None] if key.startswith("clip") else one for key, one in tensors.items()}
        save_file(tensors, path, metadata)
    succeed_here("wan_train_network.py", *run, folder=tmp_path)
    again = load_file(tmp_path / "out" / "lora.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())


def test_a_plan_is_that_of_the_picture_with_most_control_images(
    tmp_path: Path, start: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tmp_path, start, 1)
    (path,) = (tmp_path / "cache").glob("b_*_wan.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, name = load_file(path), "latents_image_2x4x6_float32"
    tensors["latents_image_3x4x6_float32"] = torch.cat([tensors[name], tensors.pop(name)[:, :1]], dim=1)
    save_file(tensors, path, metadata)
    monkeypatch.chdir(tmp_path)

    items = find_items(load_dataset_config(Path("dataset.toml")), "wan", LATENT).items
    single = [replace(item, table=item.table.with_values(batch_size=1)) for item in items]

    assert [item.source_stem for item in largest_batch(with_reference_sizes(single, Stores()))] == ["b"]
