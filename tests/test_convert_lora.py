"""convert_lora.py and merge_lora.py through their command lines."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from frame_pack.files import load_dit as load_framepack
from modules.errors import CheckpointError, OptionError
from networks import convert_anima_lora_to_comfy, convert_z_image_lora_to_comfy
from networks.apply import LoraPatch
from networks.loading import WeightedLora, read_lora
from networks.metadata import model_hashes, save_network
from protocols.loading import Placement
from tests.frame_pack.making import tiny_model
from tests.networks.making import randomize, tiny_dit, wan_network
from tests.networks.making import saved as saved_hunyuan_lora
from tests.tiny import framepack_dit
from tests.tiny.dit_files import as_fp8
from tests.tiny.loras import make_lora, unused
from tests.tiny.wan_dit import diffusers_name, tiny_state, write_dit


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return load_file(path), dict(file.metadata() or {})


def convert(source: Path, output: Path, target: str, *more: str) -> None:
    convert_lora.main(["--input", str(source), "--output", str(output), "--target", target, *more])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    about = {"ss_output_name": "lora", "modelspec.title": "A title"}
    save_network(wan_network(tiny_dit(tmp_path)), path, torch.bfloat16, about)
    return path


def test_metadata_are_copied_and_hashes_made_anew(tmp_path: Path, saved: Path) -> None:
    convert(saved, tmp_path / "other.safetensors", "other")
    convert(tmp_path / "other.safetensors", tmp_path / "back.safetensors", "default")

    _, before = read(saved)
    for name in ("other", "back"):
        tensors, metadata = read(tmp_path / f"{name}.safetensors")
        assert metadata["ss_output_name"] == "lora"
        assert metadata["modelspec.title"] == "A title"
        hashes = model_hashes(tensors, metadata)
        assert {key: metadata[key] for key in hashes} == hashes
        assert metadata["sshs_model_hash"] != before["sshs_model_hash"]


@pytest.mark.usefixtures("saved")
def test_there_and_back_and_there_again_is_the_same_file_content(tmp_path: Path) -> None:
    names = ("lora", "other1", "default2", "other3", "default4")
    for source, output in zip(names, names[1:], strict=False):
        path = tmp_path / f"{output}.safetensors"
        convert(tmp_path / f"{source}.safetensors", path, output.rstrip("1234"))

    for first, second in (("other1", "other3"), ("default2", "default4")):
        one, two = read(tmp_path / f"{first}.safetensors"), read(tmp_path / f"{second}.safetensors")
        assert one[1] == two[1]
        assert one[0].keys() == two[0].keys()
        assert all(torch.equal(tensor, two[0][name]) for name, tensor in one[0].items())


def test_a_lokr_cannot_become_diffusers_but_by_baking(tmp_path: Path) -> None:
    factors = {f"lora_unet_blocks_0_ffn_0.lokr_w{number}": torch.ones(2, 2) for number in (1, 2)}
    save_file(factors, tmp_path / "x.safetensors")

    with pytest.raises(CheckpointError, match=r"cannot be expressed in this dialect\).\n  --bake"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "diffusers")
    assert not (tmp_path / "y.safetensors").exists()


def test_a_framepack_lora_has_the_models_own_names_and_comes_back_the_same(tmp_path: Path) -> None:
    network = make_lora("lora_framepack", 4, 3.0, tiny_model())
    randomize(network)
    save_network(
        network, tmp_path / "lora.safetensors", torch.float32, {"ss_base_model_version": "framepack"}
    )
    modules = {path for path, module in tiny_model().named_modules() if isinstance(module, torch.nn.Linear)}

    steps = ("lora", "other", "other"), ("other", "back", "default"), ("back", "again", "other")
    for source, output, target in steps:
        convert(tmp_path / f"{source}.safetensors", tmp_path / f"{output}.safetensors", target)

    other, back, again = (read(tmp_path / f"{name}.safetensors")[0] for name in ("other", "back", "again"))
    paths = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in other}
    assert paths <= modules
    assert len(paths) == len(network.layers) == len(other) / 2
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in again.items())
    for name, layer in network.named_children():
        product = back[f"{name}.lora_up.weight"] @ back[f"{name}.lora_down.weight"]
        torch.testing.assert_close(
            product, 3 / 4 * layer.lora_up.weight @ layer.lora_down.weight, rtol=1e-5, atol=1e-6
        )


def merge(*arguments: object) -> None:
    merge_lora.main([*map(str, arguments), "--device", "cpu"])


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    save_network(wan_network(tiny_dit(tmp_path / "model")), path, torch.bfloat16, {})
    return path


@pytest.mark.parametrize(
    ("dialect", "dtype"),
    [
        ("safetensors", torch.float32),
        *((each, torch.bfloat16) for each in ("pth", "safetensors", "sharded", "prefixed", "all_in_one")),
        *((each, torch.bfloat16) for each in ("diffusers", "diffusers_sharded")),
    ],
)
def test_every_layout_of_a_model_is_merged_under_its_own_names(
    tmp_path: Path, lora: Path, dialect: str, dtype: torch.dtype
) -> None:
    state = tiny_state("t2v", dtype=dtype)
    model = write_dit(tmp_path, state, dialect)

    merge(
        *("--dit", model, "--lora_weight", lora, "--lora_multiplier", 0.5),
        *("--save_merged_model", tmp_path / "merged.safetensors"),
    )

    patch = LoraPatch([WeightedLora(read_lora(lora), 0.5)])
    expected = {name: patch(name, tensor) for name, tensor in state.items()}
    merged = load_file(tmp_path / "merged.safetensors")
    for name, tensor in expected.items():
        stored = diffusers_name(name) if "diffusers" in dialect else name
        stored = f"model.diffusion_model.{name}" if dialect in {"prefixed", "all_in_one"} else stored
        assert torch.equal(merged[stored], tensor), name
    assert len(merged) == len(expected) + (2 if dialect == "all_in_one" else 0)


def test_metadata_are_kept_but_for_stale_hashes(tmp_path: Path, lora: Path) -> None:
    save_file(
        tiny_state("t2v"),
        tmp_path / "dit.safetensors",
        metadata={"modelspec.title": "A title", "modelspec.hash_sha256": "0x1"},
    )

    merge(
        *("--dit", tmp_path / "dit.safetensors", "--lora_weight", lora),
        *("--save_merged_model", tmp_path / "out.safetensors"),
    )

    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {
            "modelspec.title": "A title",
            "modelspec.merged_from": "dit.safetensors, lora.safetensors",
        }


def test_fp8_weights_whose_scales_are_elsewhere_are_refused(tmp_path: Path, lora: Path) -> None:
    """As HunyuanVideo's, with a second file of scales; others are merged by their values."""
    torch.save(as_fp8(tiny_state("t2v"), "fp8"), tmp_path / "model.pt")

    with pytest.raises(CheckpointError, match="in 8 bits without its scale. Pass the bf16 file"):
        merge(
            *("--dit", tmp_path / "model.pt", "--lora_weight", lora),
            *("--save_merged_model", tmp_path / "out.safetensors"),
        )


@pytest.mark.slow_cases("all_in_one", "folder", "prefixed", "sharded")
@pytest.mark.parametrize("dialect", framepack_dit.DIALECTS)
def test_framepacks_and_hunyuans_loras_are_merged_into_every_layout_of_framepack(
    tmp_path: Path, dialect: str
) -> None:
    dtype = torch.bfloat16
    own = make_lora("lora_framepack", 4, 3.0, tiny_model())
    randomize(own)
    save_network(own, tmp_path / "own.safetensors", torch.bfloat16, {"ss_base_model_version": "framepack"})
    saved_hunyuan_lora(tmp_path / "hv.safetensors", dtype=torch.bfloat16)
    state = framepack_dit.tiny_state(dtype=dtype)
    model = framepack_dit.write_dit(tmp_path / "model", state, dialect)
    loras, output = (tmp_path / "own.safetensors", tmp_path / "hv.safetensors"), tmp_path / "out.safetensors"

    merge(
        "--dit", model, "--lora_weight", *loras, "--lora_multiplier", 0.5, -2, "--save_merged_model", output
    )

    patch = LoraPatch(
        [WeightedLora(read_lora(path), multiplier) for path, multiplier in zip(loras, (0.5, -2), strict=True)]
    )
    merged = load_framepack(output, Placement(torch.device("cpu"))).state_dict()
    for name, tensor in state.items():
        assert torch.equal(merged[name].to(dtype), patch(name, tensor)), name
    assert unused(patch) == []
    changed = [name for name, tensor in state.items() if not torch.equal(merged[name].to(dtype), tensor)]
    assert len(changed) == len(own.layers) == 2 * 12 + 3 * 5


QKV = "diffusion_model.double_blocks.3.img_attn.qkv"  # of FLUX.1, HunyuanVideo or FLUX.2 (klein 4B)


def write_qkv(path: Path) -> Path:
    factors = {"lora_A.weight": torch.ones(1, 3072), "lora_B.weight": torch.ones(9216, 1)}
    save_file({f"{QKV}.{part}": one for part, one in factors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("family", "start"),
    [
        ("flux", "transformer.transformer_blocks.3.attn.to_"),
        ("hunyuan_video", "diffusion_model.double_blocks.3.img_attn_qkv"),
        ("flux_2", "diffusion_model.double_blocks.3.img_attn.qkv"),
    ],
)
def test_a_file_of_several_possible_models_is_converted_once_its_model_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, start: str
) -> None:
    source, output = write_qkv(tmp_path / "x.safetensors"), tmp_path / "y.safetensors"
    with pytest.raises(CheckpointError, match="can be for hunyuan_video or flux or flux_2.*\n.*--family"):
        convert(source, output, "comfyui")
    assert not output.exists()

    with caplog.at_level("INFO"):
        convert(source, output, "comfyui", "--family", family)

    assert all(name.startswith(start) for name in read(output)[0])
    assert re.search(rf"model: +{family}\b", caplog.text)
    assert read_lora(output).families()[0].name == family  # the file says it from now on


@pytest.mark.parametrize(
    ("family", "metadata", "says"),
    [
        ("wan", {}, "flux or flux_2 according to its names, not for wan"),
        ("hunyuan_image", {"ss_base_model_version": "flux1"}, "for flux according to its metadata, not"),
        ("flux_9", {}, "--family flux_9: unknown model; known ones are wan, hunyuan_video"),
    ],
)
def test_a_model_that_a_file_is_not_for_is_refused(
    tmp_path: Path, family: str, metadata: dict[str, str], says: str
) -> None:
    source = write_qkv(tmp_path / "x.safetensors")
    save_file(load_file(source), source, metadata)

    with pytest.raises((CheckpointError, OptionError), match=says):
        convert(source, tmp_path / "y.safetensors", "other", "--family", family)


def test_joined_factors_stand_in_the_order_of_the_rows(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors, changes = dict[str, Tensor](), dict[str, Tensor]()
    for character in "kvq":  # as files sorted otherwise have them
        down, up = torch.randn(1, 6, generator=generator), torch.randn(6, 1, generator=generator)
        changes[character] = up @ down
        name = f"diffusion_model.layers.0.attention.to_{character}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "x.safetensors", {"ss_base_model_version": "z_image"})

    convert_z_image_lora_to_comfy.main([str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")])

    full = load_file(tmp_path / "y.safetensors")
    (up,) = (one for name, one in full.items() if name.endswith("lora_up.weight"))
    (down,) = (one for name, one in full.items() if name.endswith("lora_down.weight"))
    assert [row.nonzero().flatten().tolist() for row in up[::6]] == [[0], [1], [2]]
    torch.testing.assert_close(up @ down, torch.cat([changes[character] for character in "qkv"]))


@pytest.mark.parametrize(
    ("metadata", "is_frozen"),
    [
        ({"ss_network_module": "networks.lora_ltx2"}, True),  # musubi-tuner's fork
        ({"ss_dora_scale_format": "comfy_weight_norm"}, True),
        ({"ss_network_module": "networks.lora_ltx2", "reelsmith_layout": "x"}, False),
        ({}, False),
    ],
)
def test_doras_that_others_wrote_for_comfyui_are_read_as_there(
    tmp_path: Path, metadata: dict[str, str], is_frozen: bool
) -> None:
    name = "transformer_blocks.0.attn1.to_q"
    weight, numbers = torch.arange(48.0).sin().view(8, 6), torch.arange(8.0)[:, None]
    down, up, scale = torch.full((1, 6), 0.3), numbers / 8, 0.5 + numbers
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "dora_scale": scale}
    path = tmp_path / "x.safetensors"
    save_file({f"diffusion_model.{name}.{part}": one for part, one in tensors.items()}, path, metadata)

    found = LoraPatch([WeightedLora(read_lora(path), 0.5)])(f"{name}.weight", weight)

    new = weight + up @ down
    norms = (weight if is_frozen else new).norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, weight + 0.5 * (new * scale / norms - weight))


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("LoRA", ["--dit", "{dit}"], "has no DoRA magnitudes by output, so --target other needs no model"),
        ("DoRA", ["--dit", "{dit}", "--target", "default"], "already has this form"),
        ("for ComfyUI", ["--target", "diffusers"], "in ComfyUI's form, .*\n.*Add --dit"),
    ],
)
def test_a_model_for_nothing_and_a_missing_one_are_refused(
    tmp_path: Path, kind: str, more: list[str], says: str
) -> None:
    factors = {"lora_A.weight": torch.ones(1, 4), "lora_B.weight": torch.ones(4, 1)}
    factors |= {} if kind == "LoRA" else {"dora_scale": torch.ones(4, 1)}
    metadata = {"ss_dora_scale_format": "comfy_weight_norm"} if kind == "for ComfyUI" else {}
    source, dit = tmp_path / "x.safetensors", tmp_path / "dit.safetensors"
    save_file(
        {f"diffusion_model.blocks.0.ffn.0.{part}": one for part, one in factors.items()}, source, metadata
    )
    save_file({"blocks.0.ffn.0.weight": torch.ones(4, 4)}, dit)

    with pytest.raises((CheckpointError, OptionError), match=says):
        convert(source, tmp_path / "y.safetensors", "other", *(word.format(dit=dit) for word in more))


def test_a_loha_of_text_encoders_and_convolutions_does_not_become_an_empty_file(tmp_path: Path) -> None:
    sizes = {"hada_w1_a": (32, 3), "hada_w1_b": (3, 288), "hada_w2_a": (32, 3), "hada_w2_b": (3, 288)}
    modules = ("lora_unet_input_blocks_1_0_in_layers_2", "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    factors = {f"{name}.{part}": torch.ones(size) for name in modules for part, size in sizes.items()}
    save_file(factors, tmp_path / "x.safetensors")

    with pytest.raises(CheckpointError, match=r"cannot be converted(.|\n)*--bake RANK"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "diffusers", "--family", "sdxl")

    assert not (tmp_path / "y.safetensors").exists()


def test_a_lora_of_anima_goes_to_comfyui_and_back(tmp_path: Path) -> None:
    name = "lora_unet_blocks_0_self_attn_q_proj"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "x.safetensors", {"ss_base_model_version": "anima"})
    places = [str(tmp_path / f"{name}.safetensors") for name in ("x", "comfy", "back")]

    convert_anima_lora_to_comfy.main(places[:2])
    convert_anima_lora_to_comfy.main(["--reverse", *places[1:]])

    assert all(name.startswith("diffusion_model.blocks.0.self_attn.q_proj.") for name in load_file(places[1]))
    assert load_file(places[2]).keys() == tensors.keys()
