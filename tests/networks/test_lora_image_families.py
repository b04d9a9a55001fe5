"""LoRAs in the image families' transformers: recorded gradients and modules, predictions in diffusers."""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, ZImagePipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tests.flux.making as flux
import tests.flux_2.making as flux_2
import tests.hunyuan_image.making as hunyuan_image
import tests.lumina.making as lumina
import tests.z_image.making as z_image
from flux.files import load_dit
from flux.spec import CHROMA_DIT, FLUX_DIT
from hunyuan_image.configs import DIT as HUNYUAN_IMAGE_DIT
from lumina.configs import DIT as LUMINA_DIT
from lumina.files import load_dit as load_lumina
from modules.errors import OptionError
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.loading import WeightedLora, read_lora
from networks.lora_network import OwnNetwork
from networks.metadata import save_network
from protocols.family import DitSpec
from tests.golden_cases import load_model, make_weights, read_case
from tests.manifests import tensor_list
from tests.networks.making import assert_recorded
from tests.tiny.dits import dit_called
from tests.tiny.loras import make_lora, unused
from tests.tiny.lumina import tiny_state

Both = Callable[[nn.Module, nn.Module], tuple[Tensor, Tensor]]  # ours, theirs -> their predictions
MODULES: dict[str, Any] = {
    "flux": "lora_flux",
    "chroma": "lora_flux",
    "hunyuan_image": "lora_hunyuan_image",
    "lumina": "lora_lumina",
    "flux_2": "lora_flux_2",
}


def golden_lora(network: OwnNetwork, settings: dict[str, Any]) -> None:
    """Fill the factors by the rule of the recorded cases; split layers part by part."""
    key, extra = settings["weights_model_key"], settings["lora_up_extra_scale"]

    def drawn(name: str, parts: list[Tensor], number: str) -> None:
        for index, part in enumerate(parts):
            full = f"{name}.{index}.weight" if number else f"{name}.weight"
            value = make_weights(key, [[full, list(part.shape)]])[full]
            part.copy_(value * extra if "lora_up" in name else value)

    with torch.no_grad():
        for name, layer in zip(network.names, network.layers, strict=True):
            pairs = layer.factor_pairs()
            number = "0" if len(pairs) > 1 else ""
            drawn(f"{name}.lora_down", [down for down, _ in pairs], number)
            drawn(f"{name}.lora_up", [up for _, up in pairs], number)


def gradients(network: OwnNetwork) -> dict[str, Tensor]:
    """By the recorded names: those of split layers part by part."""
    found = {}
    for name, layer in zip(network.names, network.layers, strict=True):
        down, up = layer.lora_down.weight.grad, layer.lora_up.weight.grad
        assert down is not None
        assert up is not None
        split_sizes = [len(one) for _, one in layer.factor_pairs()]
        for factor, full in (("lora_down", down.chunk(len(split_sizes))), ("lora_up", up.split(split_sizes))):
            for index, part in enumerate(full):
                number = f".{index}" if len(split_sizes) > 1 else ""
                found[f"{name}.{factor}{number}.weight"] = part
    return found


def _flux(case: str, given: dict[str, Tensor]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = load_model(case, load_dit)
    guidance = torch.ones(2) if "pooled" in given else None

    def run(noisy: Tensor) -> Tensor:
        times = 1000 * given["s"]
        out = model(
            noisy.unsqueeze(2), times, given["t5"], given.get("t5_mask"), given.get("pooled"), guidance
        )
        return out.squeeze(2)

    return model, run


def _hunyuan_image(_: str, given: dict[str, Tensor]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = hunyuan_image.golden_model()
    texts = [given[name] for name in ("text", "text_mask", "byt5", "byt5_mask")]
    return model, lambda noisy: model(noisy, (1000 * given["s"]).trunc(), *texts)


def _lumina(_: str, given: dict[str, Tensor]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = load_model("lumina_dit", load_lumina)
    return model, lambda noisy: model(noisy, 1 - given["s"], given["cap_feats"], given["cap_mask"])


@pytest.mark.parametrize(
    ("case", "model_of", "build", "arguments"),
    [
        ("lora_flux", "flux_dit_guidance", _flux, {}),
        ("lora_flux_split_qkv", "flux_dit_guidance", _flux, {"split_qkv": "True"}),
        ("lora_chroma", "chroma_dit", _flux, {}),
        ("lora_hunyuan_image", "", _hunyuan_image, {}),
        ("lora_lumina", "", _lumina, {}),
    ],
)
def test_forward_loss_and_gradients_equal_the_recorded_ones(
    case: str, model_of: str, build: Callable[..., Any], arguments: dict[str, str]
) -> None:
    description, given = read_case(case)
    dit, run = build(model_of, given)
    settings, tolerance = description["lora"], description["tolerance"]
    module = next(module for name, module in MODULES.items() if name in case)
    network = make_lora(module, settings["rank"], settings["alpha"], dit, **arguments)
    golden_lora(network, settings)
    hooked = {layer: layer.forward for layer in dit.modules() if isinstance(layer, nn.Linear)}
    network.attach()
    s = given["s"].view(-1, 1, 1, 1)
    velocity = given["noise"] - given["latents"]

    out = run((1 - s) * given["latents"] + s * given["noise"])
    loss = nn.functional.mse_loss(out, -velocity if "lumina" in case else velocity)
    loss.backward()

    for layer, forward in hooked.items():  # the model is kept for other tests
        layer.forward = forward  # type: ignore[method-assign]
    torch.testing.assert_close(out, given["out"], rtol=1e-4, **tolerance["out"])
    assert_recorded(gradients(network), dit, loss, description, given)


def models(
    family: str,
) -> tuple[nn.Module, nn.Module, Both]:
    """Our tiny transformer, diffusers' with the same weights, and both their predictions."""
    if family == "hunyuan_image":
        tiny = dit_called(family)
        inputs = tiny.inputs((1, 4, 6, 9), 2)
        there = hunyuan_image.in_diffusers.__wrapped__()

        def both(ours: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
            return ours(**inputs), hunyuan_image.run_there(theirs, inputs)

        return (
            tiny.make((hunyuan_image.CONFIG.double_blocks, hunyuan_image.CONFIG.single_blocks)),
            there,
            both,
        )
    if family == "lumina":
        tiny = dit_called(family)
        given = tiny.inputs((1, 4, 6, 12), 2)

        def both(ours: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
            return ours(**given), theirs(*given.values()).sample

        return tiny.make(lumina.CONFIG.num_layers), lumina.in_diffusers(tiny_state()), both
    if family == "flux_2":
        of_flux_2 = flux_2.tiny_inputs()

        def both(ours: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
            return ours(**of_flux_2), flux_2.predict_with(theirs, of_flux_2)

        return flux_2.tiny_model(), flux_2.in_diffusers(flux_2.tiny_state()), both
    kind = "dev" if family == "flux" else "chroma"
    of_flux = flux.tiny_inputs(kind, (5,))

    def both(ours: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
        return ours(**of_flux), flux.run_there(theirs, of_flux, 0)

    return flux.tiny_model(kind), flux.in_diffusers(kind), both


EVERYTHING = {
    "flux": {"in_dims": "[2,2,2,2,2]"},
    "chroma": {"in_dims": "[2,0,0,0,2]"},
    "lumina": {"embedder_dims": "[2,2,2]"},
    "hunyuan_image": {},
    "flux_2": {},
}


def named(family: str) -> dict[str, str]:
    """Metadata that tell the family. FLUX.2 has none here: sizes tell it, as its names are FLUX.1's."""
    return {} if family == "flux_2" else {"ss_base_model_version": family}


@pytest.mark.parametrize(
    ("family", "split"),
    [*((family, False) for family in MODULES), *((one, True) for one in list(MODULES)[:4])],
)
@torch.no_grad()
def test_a_converted_lora_predicts_in_diffusers_what_it_predicts_here(
    tmp_path: Path, family: str, split: bool
) -> None:
    ours, theirs, both = models(family)
    network = make_lora(
        MODULES[family], 4, 2.0, ours, **EVERYTHING[family], **({"split_qkv": "True"} if split else {})
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_network(network, tmp_path / "lora.safetensors", None, named(family))
    plain, _ = both(ours, theirs)
    network.attach()

    convert_file(tmp_path / "lora.safetensors", tmp_path / "there.safetensors", "diffusers")
    theirs.load_lora_adapter(load_file(tmp_path / "there.safetensors"), prefix="transformer")

    here, there = both(ours, theirs)
    assert float((here - plain).abs().max()) > 0.01 * float(plain.abs().max())
    assert float((here - there).abs().max()) <= 1e-4 * float(there.abs().max())


@pytest.mark.parametrize("family", MODULES)
@torch.no_grad()
def test_a_file_of_diffusers_changes_a_model_as_the_network_did(tmp_path: Path, family: str) -> None:
    """Those for ComfyUI: tests/networks/test_read_by_comfyui.py."""
    ours, _, _ = models(family)
    network = make_lora(MODULES[family], 4, 2.0, ours, **EVERYTHING[family])
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_network(network, tmp_path / "lora.safetensors", None, named(family))
    convert_file(tmp_path / "lora.safetensors", tmp_path / "converted.safetensors", "diffusers")

    found = []
    for name in ("lora", "converted"):
        patch = LoraPatch([WeightedLora(read_lora(tmp_path / f"{name}.safetensors"), 0.5)])
        found.append({key: patch(key, weight) for key, weight in ours.state_dict().items()})
        patch.check()
        assert unused(patch) == []

    for key, weight in found[0].items():
        torch.testing.assert_close(found[1][key], weight, rtol=1e-5, atol=1e-6, msg=key)
    assert any(not torch.equal(weight, ours.state_dict()[key]) for key, weight in found[0].items())


PUBLISHED = {
    "flux": ("flux1-dev-dit", FLUX_DIT),
    "chroma": ("chroma1-dit", CHROMA_DIT),
    "hunyuan_image": ("hunyuanimage2.1-dit", HUNYUAN_IMAGE_DIT),
    "lumina": ("lumina2-dit", LUMINA_DIT),
}
CLIP = (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
T5 = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
GEMMA = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))


def skeleton(shapes: Mapping[str, tuple[int, ...]], spec: DitSpec = FLUX_DIT) -> nn.Module:
    """A network with Linear layers of these names, on the meta device."""
    root = nn.Module()
    root.spec = spec  # type: ignore[assignment]
    with torch.device("meta"):
        for path, (rows, columns) in shapes.items():
            *parents, leaf = path.split(".")
            module = root
            for name in parents:
                if not hasattr(module, name):
                    module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            module.add_module(leaf, nn.Linear(columns, rows))
    return root


def dit(family: str, depth: int | None = None) -> nn.Module:
    manifest, spec = PUBLISHED[family]
    shapes = {
        name.removesuffix(".weight"): shape[:2]
        for name, (_, shape) in tensor_list(manifest).items()
        if name.endswith(".weight") and len(shape) == 2
    }
    number = r"(?:blocks|layers)\.(\d+)\."
    kept = {
        path: shape
        for path, shape in shapes.items()
        if depth is None or (found := re.search(number, path)) is None or int(found[1]) < depth
    }
    return skeleton(kept, spec)


def encoder(start: str, endings: tuple[str, ...], depth: int) -> nn.Module:
    paths = [f"{start}.{n}.{ending}" for n in range(depth) for ending in endings]
    return skeleton(dict.fromkeys(paths, (8, 8)), DitSpec((start,)))


def encoders(which: str) -> dict[str, nn.Module]:
    if which == "Gemma2 too":
        return {"lora_te": encoder("layers", GEMMA, 1)}
    if which.startswith("CLIP-L"):
        return {"lora_te1": encoder("encoder.layers", CLIP, 2), "lora_te3": encoder("blocks", T5, 1)}
    return {}


def network(family: str, which: str, arguments: list[str]) -> OwnNetwork:
    pairs = dict(argument.split("=", 1) for argument in arguments)
    texts = encoders(which)
    return make_lora(MODULES[family], 4, 1.0, texts=texts, dit=dit(family, 2), **pairs)


@pytest.mark.parametrize(
    ("argument", "dots", "underscores"),
    [
        ("network_reg_dims", r"single_blocks\.1\.linear1", "single_blocks_1_linear1"),
        ("network_reg_dims", r"double_blocks\.[01]\.img_attn", "double_blocks_[01]_img_attn"),
        ("network_reg_lrs", r"layers\.0\.mlp\.fc1", "layers_0_mlp_fc1"),  # of the text encoder too
        ("exclude_patterns", r".*single_blocks\.1\.linear1", "lora_unet_single_blocks_1_linear1$"),
        ("exclude_patterns", r".*img_attn\.qkv", "blocks_._img_attn_qkv"),
    ],
)
def test_patterns_choose_the_same_modules_with_dots_and_with_underscores(
    argument: str, dots: str, underscores: str, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"['{one}']" if argument == "exclude_patterns" else f"{one}=2" for one in (dots, underscores)]
    plain = network("flux", "CLIP-L", [])
    with_dots, without = [network("flux", "CLIP-L", [f"{argument}={word}"]) for word in words]

    assert sizes_of(with_dots) == sizes_of(without)
    assert sizes_of(without) != sizes_of(plain)
    assert "matches no name" not in caplog.text


def sizes_of(made: OwnNetwork) -> list[tuple[str, int, float]]:
    """Names, ranks and learning rates of all modules."""
    groups, _ = made.parameter_groups(1.0)
    rates = {id(one): group["lr"] for group in groups for one in group["params"]}
    pairs = zip(made.names, made.layers, strict=True)
    return [(name, layer.rank, rates[id(layer.lora_down.weight)]) for name, layer in pairs]


def test_a_pattern_that_fits_nothing_is_told_with_the_nearest_names(caplog: pytest.LogCaptureFixture) -> None:
    made = network("flux", "", ["network_reg_dims=img_atn=8", r"exclude_patterns=['.*_blocks\.9\.']"])

    assert {layer.rank for layer in made.layers} == {4}
    said = [text for text in caplog.messages if "matches no name" in text]
    assert [text.split(":")[0] for text in said] == [
        "--network_args exclude_patterns",
        "--network_args network_reg_dims",
    ]
    assert "Similar: blocks_N, " in said[0]
    assert "img_attn" in said[1]


RECORDED = read_case("image_lora_modules")[0]["families"]


@pytest.mark.parametrize(
    ("family", "which"), [(family, which) for family, cases in RECORDED.items() for which in cases]
)
def test_modules_and_ranks_are_the_recorded_ones(family: str, which: str) -> None:
    case = RECORDED[family][which]

    made = network(family, which, case["network_args"])

    assert {name: layer.rank for name, layer in zip(made.names, made.layers, strict=True)} == dict(
        case["modules"]
    )
    if "learning_rates" in case:
        groups, _ = made.parameter_groups(**case["given"])
        names = {id(parameter): name for name, parameter in made.named_parameters()}
        rates = {names[id(one)]: group["lr"] for group in groups for one in group["params"]}
        assert rates == pytest.approx(case["learning_rates"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"train_double_block_indices": "0,19"}, "no block 19"),
        ({"train_single_block_indices": "5-3"}, "write all, none, or numbers"),
        ({"train_double_block_indices": "0-99999999999"}, "numbers of blocks such as"),
        ({"train_blocks": "triple"}, "pass one of all, double, single"),
        ({"in_dims": "[1,2]"}, "write 5 ranks"),
        ({"img_attn_dims": "4"}, "Did you mean img_attn_dim"),
        ({"network_reg_dims": "img_attn"}, "is not a pair"),
        ({"network_reg_lrs": "(=1e-3"}, "is not a regular expression"),
        ({"ggpo_sigma": "0.1"}, "need each other"),
        ({"split_qkv": "True", "dora_wd": "True"}, "cannot be used together"),
        ({"train_blocks": "single", "single_dim": "0", "single_mod_dim": "0"}, "no module left"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words).replace(r"\ ", " ")):
        make_lora("lora_flux", 4, 1.0, dit("flux"), **arguments)


def test_the_last_pattern_that_fits_counts_and_overlaps_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        made = network("flux", "", ["network_reg_dims=img=8,img_attn=2"])

    ranks = dict(zip(made.names, (layer.rank for layer in made.layers), strict=True))
    block = "lora_unet_double_blocks_1_img"
    assert (ranks[f"{block}_attn_qkv"], ranks[f"{block}_mlp_0"]) == (2, 8)
    assert "4 modules match 'img' and the later 'img_attn', which takes precedence (2)" in caplog.text


def test_each_text_encoder_has_its_learning_rate_and_lora_plus_its_ratio() -> None:
    ratios = ["loraplus_unet_lr_ratio=2", "loraplus_text_encoder_lr_ratio=3"]
    made = network("flux", "CLIP-L and T5", ["train_t5xxl=True", *ratios])

    groups, names = made.parameter_groups(1.0, text_encoder_lr=[0.5, 0.25])

    rates = {name: group["lr"] for name, group in zip(names, groups, strict=True)}
    assert rates == {
        **{"unet": 1.0, "unet plus": 2.0},
        **{"lora_te1": 0.5, "lora_te1 plus": 1.5, "lora_te3": 0.25, "lora_te3 plus": 0.75},
    }
    _, learning = network("flux", "CLIP-L", []).parameter_groups(1.0, text_encoder_lr=[0.0])
    assert learning == ["unet"]  # a rate of 0: not trained


@pytest.mark.parametrize(
    ("family", "kind", "target"),
    [
        *(("flux_2", kind, "diffusers") for kind in ("LoKr", "whole LoKr", "LyCORIS LoKr", "LoRA")),
        ("flux_2", "LoRA", "as saved"),
        *(("z_image", kind, target) for kind in ("LoKr", "LoRA") for target in ("diffusers", "other")),
    ],
)
@torch.no_grad()
def test_pipelines_make_of_a_file_what_is_made_of_it_here(
    tmp_path: Path, family: str, kind: str, target: str
) -> None:
    """The table of docs/generation.md, "What other tools read"."""
    made: Any = flux_2 if family == "flux_2" else z_image
    state, generator, tensors = made.tiny_state(), torch.Generator().manual_seed(3), dict[str, Tensor]()
    is_cut = "LyCORIS" in kind  # by its names in diffusers' layout
    layers = made.diffusers_state(state) if is_cut else state
    for name, weight in layers.items():
        if name.endswith(".weight") and weight.ndim == 2 and re.search(r"(blocks|layers)\.\d", name):
            rows, columns = weight.shape
            shapes = {"lora_down.weight": (2, columns), "lora_up.weight": (rows, 2)}
            if "LoKr" in kind:
                low = {"lokr_w2_a": (rows // 2, 2), "lokr_w2_b": (2, columns // 2)}
                full = {"lokr_w2": (rows // 2, columns // 2)}
                shapes = {"lokr_w1": (2, 2), **(full if "whole" in kind else low)}
            start = "lycoris_" if is_cut else "lora_unet_"
            module = start + name.removesuffix(".weight").replace(".", "_")
            for part, shape in shapes.items():
                tensors[f"{module}.{part}"] = 0.2 * torch.randn(shape, generator=generator)
            tensors[f"{module}.alpha"] = torch.tensor(3.0)
    path = tmp_path / "saved.safetensors"
    save_file(tensors, path, named(family) or None)
    patch, ours, theirs = (
        LoraPatch([WeightedLora(read_lora(path))]),
        made.tiny_model(),
        made.in_diffusers(state),
    )
    ours.load_state_dict({name: patch(name, weight) for name, weight in ours.state_dict().items()})
    given = made.tiny_inputs()
    plain = made.predict_with(theirs, given)
    if target != "as saved":
        convert_file(path, path := tmp_path / "there.safetensors", target)

    pipeline = Flux2Pipeline if family == "flux_2" else ZImagePipeline
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline(scheduler, *[None] * 3, transformer=theirs).load_lora_weights(load_file(path))

    here, there = ours(**given), made.predict_with(theirs, given)
    assert float((here - plain).abs().max()) > 0.01 * float(plain.abs().max())
    assert float((here - there).abs().max()) <= 1e-4 * float(there.abs().max())
