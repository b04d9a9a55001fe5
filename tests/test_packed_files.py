"""Files as they are distributed: what is generated from packed weights is what their values give."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge_lora
from checkpoints.changing import CheckpointChange, plan_change
from checkpoints.opening import list_tensor_sources, open_checkpoint
from modules.errors import CheckpointError
from networks import extract_lora_from_models
from networks.apply import check_loras_fit
from networks.loading import WeightedLora, read_lora
from runtime.planning import memory_plan
from runtime.planning.dry_run import NETWORK, WEIGHTS
from tests.faults.messages import assert_one_message, run_here
from tests.packing import FORMS, GGUF_KINDS, gguf_file, pack_file, text_encoder_gguf
from tests.tiny import z_image
from tests.tiny.dit_files import as_fp8
from tests.tiny.families import FAMILIES
from tests.tiny.project import write_lora
from tests.tiny.runs import SIZE, TinyProject, make_project
from tests.tiny.wan_encoders import t5_hf_tensors

pytest.importorskip("comfy_kitchen")
pytest.importorskip("gguf")
pytest.importorskip("bitsandbytes")

CHOSEN = {family.name: family for family in FAMILIES}
SAY = ("--prompt", "a cat", "--seed", "1", "--dit_dtype", "float32")


OTHERS = ("wan t2v-1.3B", "z_image", "flux_2")


def project_of(name: str, folder: Path) -> TinyProject:
    CHOSEN[name].prepare(folder)
    return TinyProject(CHOSEN[name], folder)


def compare(project: TinyProject, packed: Path, maximum: float = 1e-4, *more: object) -> None:
    """Generate from the unpacked file and from the packed one in its place."""
    dit = project.folder / "model" / "dit.safetensors"
    (plain,) = project.generate("plain", *SAY, *more)
    packed.replace(dit)
    (found,) = project.generate("packed", *SAY, *more)
    for name, latents in plain.items():
        difference = float((found[name] - latents).abs().max() / latents.abs().max())
        assert difference <= maximum


@pytest.mark.slow_cases(
    "flux_2-Q4_0", "flux_2-convrot", "wan t2v-1.3B-nvfp4", "z_image-Q4_0", "z_image-convrot", "z_image-nvfp4"
)
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("qwen_image", form) for form in (*FORMS, *GGUF_KINDS)),
        *(
            (name, form)
            for name in ("wan t2v-1.3B", "z_image", "flux_2")
            for form in ("convrot", "nvfp4", "Q4_0")
        ),
    ],
)
def test_generation_is_that_of_the_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, form: str
) -> None:
    project = project_of(name, tmp_path)
    dit = tmp_path / "model" / "dit.safetensors"
    packed = gguf_file(dit, form) if form in GGUF_KINDS else pack_file(dit, form, header=name == "qwen_image")

    with caplog.at_level(logging.INFO):
        # products in int8 round what goes into a layer: 0.3 % of a product, here of three steps of two blocks
        compare(project, packed, 3e-2 if form in {"int8", "convrot"} else 1e-4)

    assert form == "BF16" or "as in the file" in caplog.text


def test_a_lora_learns_on_a_gguf_file_as_on_its_values(tmp_path: Path) -> None:
    project = make_project(CHOSEN["z_image"], tmp_path)
    dit = tmp_path / "model" / "dit.safetensors"
    packed = gguf_file(dit, "Q8_0")
    plain = project.train("plain", "--mixed_precision", "no")
    packed.replace(dit)

    found = project.train("packed", "--mixed_precision", "no")

    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert (found[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max().clamp_min(1e-9)


def lora_for(dit: Path, path: Path, kind: str) -> None:
    """A LoRA, LoKr or DoRA of a Wan, or a LoRA of the queries of a FLUX.2, whose weights join them."""
    if kind != "queries":
        write_lora(path, dit, kind=kind)
        return
    width = load_file(dit)["double_blocks.0.img_attn.qkv.weight"].shape[1]
    start = "transformer.transformer_blocks.0.attn.to_q"
    random = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=random) * 0.1 for shape in ((2, width), (width, 2)))
    save_file({f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}, path)


@pytest.mark.slow_cases("Q8_0-LoRA-True", "mxfp8-LoRA-True", "nvfp4-LoRA-True", "nvfp4-queries-True")
@pytest.mark.parametrize(
    ("form", "kind", "kept"),
    [
        *((form, "LoRA", True) for form in ("int8", "mxfp8", "nvfp4", "nf4", "Q8_0")),
        *(("Q4_0", "LoKr", True), ("nvfp4", "DoRA", False), ("nvfp4", "queries", True)),
    ],
)
def test_a_lora_is_added_beside_packed_layers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, kind: str, kept: bool
) -> None:
    """The values with the LoRA merged give the same; a DoRA's layers alone are made plain."""
    project = project_of("flux_2" if kind == "queries" else "wan t2v-1.3B", tmp_path)
    dit, lora = tmp_path / "model" / "dit.safetensors", tmp_path / "lora.safetensors"
    lora_for(dit, lora, kind)
    packed = gguf_file(dit, form) if form in GGUF_KINDS else pack_file(dit, form)
    (without,) = project.generate("without", *SAY)
    (merged,) = project.generate("merged", *SAY, "--lora_weight", lora)
    assert any((merged[name] - tensor).abs().max() > 1e-2 for name, tensor in without.items())

    with caplog.at_level(logging.INFO):
        compare(project, packed, 3e-2 if form == "int8" else 1e-4, "--lora_weight", lora)

    assert "stay in" in caplog.text
    assert ("stored layers are kept in 16 bits" in caplog.text) != kept
    assert kept or "3 of " in caplog.text


@pytest.mark.slow
def test_a_plan_counts_small_forms_and_loras_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text encoder in the form that is asked for, the transformer in that of its file."""
    plans: list[memory_plan.MemoryPlan] = []
    monkeypatch.setattr(memory_plan, "show", lambda plan, _: plans.append(plan))
    project = project_of("wan t2v-1.3B", tmp_path)
    dit, lora = tmp_path / "model" / "dit.safetensors", tmp_path / "lora.safetensors"
    write_lora(lora, dit)

    def planned(*more: object) -> tuple[int, dict[str, int]]:
        """Bytes of the text encoder's weights, and those of each part while denoising."""
        short = *SIZE, "--video_length", "5", "--device", "cpu", "--plan", "24"
        project.run(*project.family.generate, *SAY, "--save_path", "o", *short, *more)
        texts, denoising, _ = plans.pop().phases
        return texts.parts[0].device, {part.name: part.device for part in denoising.parts}

    texts, plain = planned("--lora_weight", lora)
    small_texts, _ = planned("--text_encoder_form", "nf4")
    gguf_file(dit, "Q8_0").replace(dit)
    _, small = planned("--lora_weight", lora)

    weights, beside = memory_plan.PART_NAMES[WEIGHTS], f"{memory_plan.PART_NAMES[NETWORK]} (LoRA)"
    factors = sum(one.nbytes for name, one in load_file(lora).items() if name.endswith(".weight"))
    assert small_texts < 0.7 * texts  # embeddings stay
    assert small[weights] < 0.5 * plain[weights]
    assert beside not in plain  # merged
    assert small[beside] == factors


@pytest.mark.slow
def test_a_lora_learns_on_packed_layers_that_have_another_beside_them(tmp_path: Path) -> None:
    """`--base_weights` and `--training_adapter` go beside; for a DoRA, which learns norms, all is merged."""
    project = make_project(CHOSEN["z_image"], tmp_path)
    project.train("first", "--mixed_precision", "no")
    dit, lora = tmp_path / "model" / "dit.safetensors", "first/x.safetensors"
    packed, plain = pack_file(dit, "nvfp4"), dit.read_bytes()
    # plain descent, as it does not enlarge rounding: three steps with gradients of 1e-5 of each other
    how = ("--mixed_precision", "no", "--optimizer_type", "SGD", "--learning_rate", "1")
    how = (*how, "--training_adapter", lora, "--base_weights", lora)
    for kind, more in (("LoRA", ()), ("DoRA", ("--network_args", "dora_wd=True"))):
        dit.write_bytes(plain)
        expected = project.train(f"{kind} plain", *how, *more)
        dit.write_bytes(packed.read_bytes())
        found = project.train(f"{kind} packed", *how, *more)

        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max().clamp_min(1e-9), name


@pytest.mark.parametrize("form", ["convrot", "Q8_0"])
@pytest.mark.parametrize("name", ["wan t2v-1.3B", "z_image"])
def test_texts_are_those_of_the_values_of_a_packed_encoder(tmp_path: Path, name: str, form: str) -> None:
    """umT5 and Qwen3, with ComfyUI's marks or as GGUF with llama.cpp's names, in place of the plain file."""
    project, is_t5 = project_of(name, tmp_path), name != "z_image"
    file = tmp_path / "model" / ("t5.safetensors" if is_t5 else "text_encoder/model.safetensors")
    if is_t5:
        save_file(t5_hf_tensors(load_file(file)), file)
    if form == "Q8_0":
        packed = text_encoder_gguf(file, "T5ENCODER" if is_t5 else "QWEN3")
    else:
        packed = file.with_name("packed.bin")
        project.run("tools/quantise.py", file, "packed.safetensors", "--form", form)
        (tmp_path / "packed.safetensors").rename(packed)
    with open_checkpoint(packed) as checkpoint:
        values = {
            key: source.build_tensor([checkpoint.read(part) for part in source.names])
            for key, source in list_tensor_sources(checkpoint).items()
        }
        assert any(info.packing is not None for info in checkpoint.tensors.values())

    def states(kept: Path) -> dict[str, Tensor]:
        kept.replace(file)
        project.run(*project.family.cache_texts, *(() if is_t5 else ("--text_encoder_dtype", "float32")))
        caches = sorted((tmp_path / "cache").rglob("*_te.safetensors"))
        assert caches
        return {f"{path.name} {key}": one for path in caches for key, one in load_file(path).items()}

    # a T5 in 8 bits computes in bfloat16
    dtype = torch.bfloat16 if is_t5 else torch.float32
    plain = tmp_path / "plain.safetensors"
    save_file({key: one.to(dtype).contiguous() for key, one in values.items()}, plain)
    expected, found = states(plain), states(packed)

    assert found.keys() == expected.keys()
    # products in int8 round what goes into a layer, which T5's attention, without a scale, shows most: with
    # products in 16 bits it is within 2 % too
    maximum = {"convrot": (1e-1, 5e-2), "Q8_0": (2e-2, 1e-4)}[form][0 if is_t5 else 1]
    for key, one in expected.items():
        assert (found[key] - one).abs().max() <= maximum * one.abs().max()


def test_packed_weights_are_not_copied(tmp_path: Path) -> None:
    dit = tmp_path / "dit.safetensors"
    save_file({"blocks.0.a.weight": torch.ones(64, 64)}, dit)

    with (
        open_checkpoint(pack_file(dit, "nvfp4")) as checkpoint,
        pytest.raises(CheckpointError, match=r"blocks.0.a.weight in 4 or 8 bits.*quantise.py"),
    ):
        plan_change(checkpoint, CheckpointChange())


@pytest.mark.parametrize("form", ["int8", "convrot", "fp8_scaled", "nvfp4", "mxfp8", "nf4", "Q8_0", "Q4_K"])
def test_loras_are_merged_into_and_extracted_from_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    """The file with values in place of packed weights gives the same to the bit, in bfloat16.

    80 rows are padded in mxfp8: how many they are is known from the family's model alone.
    """
    state = z_image.tiny_state(dim=80, time_dim=80, num_heads=5, num_kv_heads=5)
    dit, lora = tmp_path / "dit.safetensors", tmp_path / "lora.safetensors"
    save_file(state, dit)
    random = torch.Generator().manual_seed(0)
    factors = {}
    for module in ("feed_forward.w1", "feed_forward.w2"):
        rows, columns = state[f"layers.0.{module}.weight"].shape
        start = f"lora_unet_layers_0_{module.replace('.', '_')}"
        factors[f"{start}.lora_down.weight"] = torch.randn(2, columns, generator=random) * 0.1
        factors[f"{start}.lora_up.weight"] = torch.randn(rows, 2, generator=random) * 0.1
    save_file(factors, lora)
    if form == "fp8_scaled":
        save_file(as_fp8(state, form), packed := tmp_path / "fp8.safetensors")
    else:
        packed = gguf_file(dit, form) if form in GGUF_KINDS else pack_file(dit, form)
    with open_checkpoint(packed) as checkpoint:
        made = list_tensor_sources(checkpoint).items()
        read = {
            n: source.build_tensor([checkpoint.read(part) for part in source.names]) for n, source in made
        }
    plain = {name: one[tuple(map(slice, state[name].shape))].contiguous() for name, one in read.items()}
    save_file(plain, dit)
    coarse = [name for name, tensor in plain.items() if not torch.equal(tensor, state[name])]
    assert len(coarse) > 2
    check_loras_fit(packed, [WeightedLora(read_lora(lora))])

    with caplog.at_level(logging.INFO):
        for name, file in {"expected": dit, "found": packed}.items():
            output = tmp_path / f"{name}.safetensors"
            words = "--dit", file, "--lora_weight", lora, "--save_merged_model", output
            merge_lora.main([*map(str, words)])
    expected, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("expected", "found"))

    assert found.keys() == expected.keys() == state.keys()
    for name, tensor in expected.items():
        if found[name].dtype == torch.bfloat16:
            assert name in coarse or torch.equal(tensor, state[name])
            tensor = tensor.to(torch.bfloat16)
        assert torch.equal(found[name], tensor), name
    assert any(not torch.equal(expected[name], plain[name]) for name in coarse)
    assert "quantized weights become bfloat16" in caplog.text

    if form not in {"mxfp8", "Q4_K"}:
        return  # a tool that reads as the other does
    tuned = "--dim", 4, "--model_tuned", tmp_path / "expected.safetensors"
    for file in (dit, packed):
        extract = (*tuned, "--model_org", file, "--save_to", tmp_path / f"of {file.stem}.safetensors")
        extract_lora_from_models.main([*map(str, extract)])
    ours, theirs = (load_file(tmp_path / f"of {file.stem}.safetensors") for file in (packed, dit))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (
        sum(line.startswith(f"{packed.name}: quantized. The LoRA will also") for line in caplog.messages) == 1
    )


def _many(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = "model.layers" if "model.norm.weight" in tensors else "layers"
    return tensors | {f"{start}.{number}.a.weight": torch.ones(1) for number in range(2, 10_000)}


def _changed(tensors: dict[str, Tensor], end: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    name = next(name for name in tensors if name.endswith(end))
    return tensors | {name: change(tensors[name])}


UNKNOWN = b'{"format": "int3"}'
LIES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no JSON": (lambda file: _changed(file, ".comfy_quant", lambda one: one[:5]), "is not JSON"),
    "unknown": (
        lambda file: _changed(file, ".comfy_quant", lambda _: torch.tensor([*UNKNOWN], dtype=torch.uint8)),
        "unknown format 'int3'; known formats are",
    ),
    "zeros": (lambda file: _changed(file, ".weight_scale", torch.zeros_like), "zero, negative, NaN"),
    "infinite": (lambda file: _changed(file, ".weight_scale", lambda one: one / 0), "infinite"),
    "rows": (lambda file: _changed(file, ".weight_scale", lambda one: one[1:]), "does not fit its weight"),
    "10,000 blocks": (_many, "layers such as"),
}


@pytest.fixture(scope="module")
def made_small(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyProject, list[Path]]:
    """A project, and its transformer and text encoder in int8; a GGUF file that is cut short."""
    project = project_of("z_image", tmp_path_factory.mktemp("lies"))
    model, made = project.folder / "model", []
    for file in (model / "dit.safetensors", model / "text_encoder" / "model.safetensors"):
        made.append(file.with_suffix(".small"))
        project.run("tools/quantise.py", file, "x.safetensors", "--form", "int8")
        (project.folder / "x.safetensors").rename(made[-1])
    cut = gguf_file(model / "dit.safetensors", "Q8_0")
    cut.write_bytes(cut.read_bytes()[:-1000])
    return project, [*made, cut]


@pytest.fixture
def small_files(made_small: tuple[TinyProject, list[Path]]) -> tuple[TinyProject, list[Path]]:
    for file in made_small[1][:2]:
        file.with_suffix(".safetensors").write_bytes(file.read_bytes())
    return made_small


@pytest.mark.parametrize(
    ("what", "lie"),
    [("dit", "cut short"), *((what, lie) for what in ("dit", "text_encoder") for lie in LIES)],
)
def test_files_that_lie_give_one_message(
    small_files: tuple[TinyProject, list[Path]], what: str, lie: str
) -> None:
    project, (dit, encoder, cut) = small_files
    small = dit if what == "dit" else encoder
    target = small.with_suffix(".safetensors")
    words = "is at bytes"
    if lie == "cut short":
        target.write_bytes(cut.read_bytes())
    else:
        change, words = LIES[lie]
        changed = change(load_file(small))
        save_file({name: one.contiguous() for name, one in changed.items()}, target)
    making = *project.family.generate, "--prompt", "a cat", "--save_path", "out"
    command = making if what == "dit" else project.family.cache_texts

    assert_one_message(*run_here(*command, folder=project.folder), "model", words)


def test_an_encoder_that_is_small_already_is_not_rounded_to_another_form(
    small_files: tuple[TinyProject, list[Path]],
) -> None:
    project, _ = small_files
    again = *project.family.cache_texts, "--text_encoder_form", "nf4"

    found = run_here(*again, folder=project.folder)

    assert_one_message(*found, "nf4 is requested", "already in int8", "--text_encoder_form")


def test_a_whole_transformer_is_not_trained_on_small_weights(
    small_files: tuple[TinyProject, list[Path]],
) -> None:
    project, _ = small_files
    project.run(*project.family.cache_latents)
    project.run(*project.family.cache_texts)
    _, *words = project.family.train
    place = words.index("--network_module")  # it, --network_dim and their values
    words = [project.family.train_full, *words[:place], *words[place + 4 :], "--output_dir", "whole"]

    found = run_here(*words, "--output_name", "x", "--max_train_steps", "1", folder=project.folder)

    assert_one_message(*found, "dit.safetensors is quantized", "--form bf16")
