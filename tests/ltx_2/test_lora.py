"""LoRAs of LTX-2: modules by preset, dialects both ways, and what diffusers makes of our files."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.dits import DitFormat
from ltx_2.checkpoints import AUDIO_ALONE, FORMAT, SILENT
from ltx_2.configs import DIT, LORA_PRESETS
from ltx_2.model import LtxModel
from modules.errors import CheckpointError
from networks.adapter import make_network as make_trained
from networks.apply import LoraPatch
from networks.gated_loras import add_loras
from networks.loading import WeightedLora, read_lora
from networks.lora_network import OwnNetwork
from networks.metadata import save_network
from networks.options import NetworkOptions
from protocols.loading import Placement
from tests.faults.messages import succeed_here
from tests.ltx_2.release import write_release
from tests.ltx_2.test_model import assert_both, in_diffusers
from tests.ltx_2.tiny_dit import dit_in_diffusers, dit_inputs, dit_state, tiny_dit, write_dit
from tests.tiny.loras import make_lora

VIDEO, SOUND = {"attn1", "attn2"}, {"audio_attn1", "audio_attn2"}
CROSS = {"audio_to_video_attn", "video_to_audio_attn"}
OF_PRESETS = {
    "t2v": VIDEO | SOUND | CROSS,
    "video_sa": {"attn1"},
    "video_sa_ff": {"attn1", "ff"},
    "video_sa_ca_ff": VIDEO | {"ff"},
    "audio": SOUND | {"audio_ff"},
    "audio_v2a": SOUND | {"audio_ff", "video_to_audio_attn"},
    "audio_ref_ic": SOUND | CROSS | {"audio_ff"},
    "v2v": VIDEO | {"ff"},
    "av_ic": VIDEO | SOUND | CROSS | {"ff", "audio_ff"},
    "video_ref_only_av": VIDEO | SOUND | CROSS | {"ff", "audio_ff"},
    "full": VIDEO | SOUND | CROSS | {"ff", "audio_ff"},
}
LINEARS = {"to_q", "to_k", "to_v", "to_out_0"}


def make_network(dit: LtxModel, preset: str = "full", rank: int = 4, **arguments: Any) -> OwnNetwork:
    """A LoRA with random factors."""
    dit.spec = replace(DIT, lora_include=LORA_PRESETS[preset])
    network = make_lora("lora_ltx2", rank, 2.0, dit, **arguments)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def modules_of(network: OwnNetwork) -> list[tuple[str, str]]:
    """(attention or feed-forward, its layer) of each module."""
    pattern = re.compile(r"lora_unet_transformer_blocks_\d+_(.*?(?:attn\d?|ff))_(.*)")
    return [pattern.fullmatch(name).groups() for name in network.names]  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("preset", LORA_PRESETS)
def test_a_preset_is_for_the_modules_of_its_streams(preset: str) -> None:
    found = modules_of(make_network(tiny_dit(), preset))

    assert {name for name, _ in found} == OF_PRESETS[preset]
    gates = {"to_gate_logits"} if preset == "full" else set()
    assert {layer for name, layer in found if "attn" in name} == LINEARS | gates
    assert {layer for name, layer in found if name.endswith("ff")} <= {"net_0_proj", "net_2"}
    if preset == "t2v":  # the preset that is not asked for
        assert found == modules_of(make_lora("lora_ltx2", 4, 2.0, tiny_dit()))


@pytest.fixture(params=["2.0", "2.3", "2.3 dora"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, tuple[Tensor, ...]]:
    """A version, the file of a LoRA, and what the network predicts with it."""
    version, _, kind = request.param.partition(" ")
    dit = tiny_dit(version)
    network = make_network(dit, dora_wd=bool(kind))
    path = tmp_path / "lora.safetensors"
    save_network(network, path, None, {"ss_base_model_version": "ltx_2"})
    network.attach()
    with torch.no_grad():
        return version, path, dit(**dit_inputs(version))


def convert(path: Path, target: str) -> Path:
    output = path.with_name(f"{target}.safetensors")
    words = ["--input", path, "--output", output, "--target", target]
    succeed_here("convert_lora.py", *words, folder=path.parent)
    return output


@pytest.mark.slow_cases("2.0", "2.3")
@torch.no_grad()
def test_diffusers_pipeline_predicts_with_a_converted_file_what_the_network_does(
    saved: tuple[str, Path, tuple[Tensor, ...]],
) -> None:
    version, path, expected = saved
    given, theirs = dit_inputs(version), dit_in_diffusers(version, dit_state(version))
    plain = in_diffusers(theirs, given)
    pipeline = LTX2Pipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 5, transformer=theirs, vocoder=None)

    # diffusers leaves out the magnitudes of a DoRA under ComfyUI's names
    has_magnitudes = any(name.endswith("dora_scale") for name in load_file(path))
    for target in ("diffusers",) if has_magnitudes else ("diffusers", "other"):
        pipeline.load_lora_weights(load_file(convert(path, target)))
        assert_both(expected, in_diffusers(theirs, given))
        pipeline.unload_lora_weights()

    assert not torch.allclose(plain[0], expected[0], rtol=1e-2)


@pytest.mark.slow_cases(
    "2.0-diffusers-transformer.",
    "2.0-kohya-lora_unet_model_",
    "2.0-other-diffusion_model.",
    "2.3 dora-diffusers-transformer.",
    "2.3 dora-kohya-lora_unet_model_",
    "2.3 dora-other-diffusion_model.",
    "2.3-kohya-lora_unet_model_",
    "2.3-other-diffusion_model.",
)
@pytest.mark.parametrize(
    ("dialect", "start"),
    [("other", "diffusion_model."), ("diffusers", "transformer."), ("kohya", "lora_unet_model_")],
)
@torch.no_grad()
def test_every_dialect_merged_predicts_what_the_network_does(
    saved: tuple[str, Path, tuple[Tensor, ...]], dialect: str, start: str
) -> None:
    version, path, expected = saved
    written = path.with_name("there.safetensors")
    if dialect == "kohya":  # as the known trainer for LTX-2 names them
        save_file({name.replace("lora_unet_", start): one for name, one in load_file(path).items()}, written)
    else:
        written = convert(path, dialect)
    assert all(name.startswith(start) for name in load_file(written))
    back = convert(written, "default")

    for each in (written, back):
        patch = LoraPatch([WeightedLora(read_lora(each), 1.0)])
        model = write_dit(path.parent / "model", version, "official")
        dit = FORMAT.load(model, Placement(torch.device("cpu"), patch=patch))
        assert_both(dit(**dit_inputs(version)), expected)


@pytest.mark.slow_cases("2.3 dora", "2.3")
def test_a_lora_is_merged_into_the_official_file(saved: tuple[str, Path, tuple[Tensor, ...]]) -> None:
    version, path, expected = saved
    model = write_dit(path.parent, version, "official")
    words = ["--dit", model, "--lora_weight", path, "--save_merged_model", "merged.safetensors"]

    succeed_here("merge_lora.py", *words, folder=path.parent)

    with torch.no_grad():
        dit = FORMAT.load(path.parent / "merged.safetensors", Placement(torch.device("cpu")))
        assert_both(dit(**dit_inputs(version)), expected)


# a layer of the transformer, of the connectors and of the projections, of picture and sound
CHANGED = re.compile(r".*(blocks\.0\.(attn1\.to_q|audio_attn2\.to_k)|ff\.net\.2|aggregate_embed)\.weight")
TO_DIFFUSERS = (
    *(
        ("diffusion_model.video_emb", "connectors.video_emb"),
        ("diffusion_model.audio_emb", "connectors.audio_emb"),
    ),
    *(("_embeddings_connector", "_connector"), ("transformer_1d_blocks", "transformer_blocks")),
    *(("text_embedding_projection.", "connectors."), ("aggregate_embed", "text_proj_in")),
    ("diffusion_model.", "transformer."),
)


ONE_PASS = [
    *("--video_size", "64", "64", "--video_length", "9", "--infer_steps", "1", "--seed", "1"),
    *("--guidance_scale", "1", "--stg_scale", "0", "--video_modality_scale", "1"),
    *("--audio_modality_scale", "1", "--dit_dtype", "float32", "--device", "cpu"),
]


def write_for_all_parts(model: Path, folder: Path, dialect: str) -> dict[str, Tensor]:
    """Write lora.safetensors, which changes the transformer, connectors and projections; return the sums."""
    generator, tensors, sums = torch.Generator().manual_seed(5), {}, load_file(model)
    for name in [name for name in sums if CHANGED.fullmatch(name) and sums[name].ndim == 2]:
        down = torch.randn(2, sums[name].shape[1], generator=generator)
        up = 0.1 * torch.randn(len(sums[name]), 2, generator=generator)
        path = name.removeprefix("model.").removesuffix(".weight")
        for there, here in TO_DIFFUSERS if dialect == "diffusers" else ():
            path = path.replace(there, here)
        tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
        sums[name] = sums[name] + up @ down
    save_file(tensors, folder / "lora.safetensors")
    return sums


@pytest.mark.slow_cases("diffusers-2.0", "diffusers-2.3", "official-2.3")
@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("dialect", ["official", "diffusers"])
def test_connectors_learned_in_a_lora_are_used_in_generation_as_in_the_merged_file(
    version: str, dialect: str, tmp_path: Path
) -> None:
    release = write_release(tmp_path, version)
    sums = write_for_all_parts(release.checkpoint, tmp_path, dialect)
    merged = tmp_path / "merged.safetensors"
    words = ["--dit", release.checkpoint, "--lora_weight", "lora.safetensors", "--save_merged_model", merged]
    assert " not in " not in succeed_here("merge_lora.py", *words, folder=tmp_path)
    for name, tensor in load_file(merged).items():
        torch.testing.assert_close(tensor, sums[name], msg=name)

    found = {}
    for label, model, lora in (
        ("added", release.checkpoint, ["--ltx2_mode", "av", "--lora_weight", "lora.safetensors"]),
        ("merged", merged, ["--ltx2_mode", "av"]),
        ("silent", release.checkpoint, ["--lora_weight", "lora.safetensors"]),
    ):
        texts = ["--gemma_root", release.gemma, "--text_encoder_dtype", "float32", "--prompt", "a cat"]
        files = ["--ltx2_checkpoint", model, "--ltx_version", version, *texts, *lora]
        made = ["--output_type", "latent", "--save_path", label]
        said = succeed_here("ltx2_generate_video.py", *files, *ONE_PASS, *made, folder=tmp_path)
        assert "damaged" not in said
        assert ("a stream that this run is without" in said) == (label == "silent")
        (path,) = (tmp_path / label).iterdir()
        found[label] = load_file(path)

    for name, latents in found["added"].items():
        torch.testing.assert_close(latents, found["merged"][name])
    if (version, dialect) == ("2.3", "official"):  # a column of a comparison is made with it, too
        files = ["--ltx2_checkpoint", release.checkpoint, "--ltx2_mode", "av", *texts]
        made = ["--output_type", "both", "--save_path", "compared"]
        lora = ["--family", "ltx_2", "--lora", "lora.safetensors"]
        succeed_here("tools/compare.py", *lora, *files, *ONE_PASS, *made, folder=tmp_path)
        (path,) = (tmp_path / "compared").glob("*_lora-x-1_*latent.safetensors")
        torch.testing.assert_close(load_file(path)["latent"], found["merged"]["latent"])
        names = load_file(convert(tmp_path / "lora.safetensors", "diffusers"))
        assert {name.partition(".")[0] for name in names} == {"transformer", "connectors"}


@pytest.mark.slow_cases(
    "added-2.3-record4-",
    "added-2.5-record0-was trained for 2.3 according to its metadata",
    "added-2.5-record1-was trained for 2.3 according to its metadata",
    "added-2.5-record2-",
    "added-2.5-record3-",
    "loaded-2.5-record0-was trained for 2.3 according to its metadata",
    "network-2.3-record4-",
    "network-2.5-record0-was trained for 2.3 according to its metadata",
    "network-2.5-record1-was trained for 2.3 according to its metadata",
    "network-2.5-record2-",
    "network-2.5-record3-",
)
@pytest.mark.parametrize(
    ("version", "record", "note"),
    [
        ("2.5", {"modelspec.architecture": "ltx-2.3/lora"}, "was trained for 2.3 according to its metadata"),
        ("2.5", {"model_version": "2.3.0"}, "was trained for 2.3 according to its metadata"),
        ("2.5", {"modelspec.architecture": "ltx-2.5/lora"}, ""),
        ("2.5", {}, ""),
        ("2.3", {"modelspec.architecture": "ltx-2.3/lora"}, ""),
    ],
)
@pytest.mark.parametrize("way", ["loaded", "added", "network"])
def test_a_lora_of_an_older_release_loads_with_a_note(
    way: str,
    version: str,
    record: dict[str, str],
    note: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    release, path = write_release(tmp_path, version), tmp_path / "lora.safetensors"
    factors = {"lora_A": torch.ones(1, 24), "lora_B": torch.ones(24, 1)}
    start = "diffusion_model.transformer_blocks.0.attn1.to_q"
    save_file({f"{start}.{name}.weight": one for name, one in factors.items()}, path, record or None)
    patch = LoraPatch([WeightedLora(read_lora(path), 1.0)] if way == "loaded" else [])
    dit = FORMAT.load(release.checkpoint, Placement(torch.device("cpu"), patch=patch))
    patch.check()
    if way == "added":
        add_loras(dit, [WeightedLora(read_lora(path), 1.0)])
    elif way == "network":
        options = replace(NetworkOptions.from_defaults(), network_weights=path, network_dim=1)
        make_trained(options, "networks.lora_ltx2", dit, 0)

    assert ("1 weights changed" in caplog.text) == (way == "loaded")
    assert ("was trained for" in caplog.text) == bool(note)
    assert note in caplog.text


@pytest.mark.parametrize("way", ["loaded", "added", "network"])
def test_what_changes_connectors_or_a_stream_is_named_where_there_is_none(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release, path = write_release(tmp_path), tmp_path / "lora.safetensors"
    write_for_all_parts(release.checkpoint, tmp_path, "official")

    def put(path: Path, streams: DitFormat[Any, LtxModel] = FORMAT) -> None:
        patch = LoraPatch([WeightedLora(read_lora(path), 1.0)] if way == "loaded" else [])
        dit = streams.load(release.checkpoint, Placement(torch.device("cpu"), patch=patch))
        patch.check()
        if way == "network":
            make_network(dit, rank=2).load_weights(path)
        elif way == "added":
            add_loras(dit, [WeightedLora(read_lora(path), 1.0)])

    put(path)

    assert "they change the text connectors" in caplog.text
    assert "a stream that this run is without" not in caplog.text
    for streams, left in ((AUDIO_ALONE, "_0_attn1_to_q"), (SILENT, "_0_audio_attn2_to_k")):
        caplog.clear()
        put(path, streams)
        (told,) = [line for line in caplog.text.splitlines() if f"unet_transformer_blocks{left}" in line]
        # a network names each layer, those of its own too
        assert way == "network" or "a stream that this run is without" in told
    assert "damaged" not in caplog.text
    save_file({name: one for name, one in load_file(path).items() if "connector" in name}, path)
    with pytest.raises(CheckpointError, match="changes only the text connectors"):
        put(path)
