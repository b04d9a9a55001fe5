"""Which modules learn: of every family and kind of network, and what joins from the file it begins with."""

import logging
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from networks.adapter import make_network
from networks.options import NetworkOptions
from tests.networks.making import load_transformer

STREAMS = "double_blocks.{0,1}.{img,txt}_"
OF_FLUX = f"{STREAMS}{{attn.qkv,attn.proj,mlp.0,mlp.2}} single_blocks.{{0,1,2}}.{{linear1,linear2}}"
OF_HUNYUAN = f"{STREAMS}{{attn_qkv,attn_proj,mlp.fc1,mlp.fc2}} single_blocks.{{0,1,2}}.{{linear1,linear2}}"
OF_WAN = "blocks.{0,1}.{self,cross}_attn.{q,k,v,o} blocks.{0,1}.ffn.{0,2}"
OF_QWEN = (
    "transformer_blocks.{0,1}.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out} "
    "transformer_blocks.{0,1}.{img,txt}_mlp.net.{0.proj,2}"
)
# of the tiny models: as the pages and the known trainers say
LEARNING = {
    "wan t2v-1.3B": OF_WAN,
    "wan i2v-14B": f"{OF_WAN} blocks.{{0,1}}.cross_attn.{{k,v}}_img",
    "hunyuan_video": OF_HUNYUAN,
    "hunyuan_image": f"{OF_HUNYUAN} {STREAMS}mod.linear single_blocks.{{0,1,2}}.modulation.linear",
    "framepack": "transformer_blocks.{0,1}.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj} "
    "transformer_blocks.{0,1}.{attn.to_add_out,ff.net.0.proj,ff.net.2} "
    "transformer_blocks.{0,1}.ff_context.net.{0.proj,2} "
    "single_transformer_blocks.{0,1,2}.{attn.to_q,attn.to_k,attn.to_v,proj_mlp,proj_out}",
    "flux": f"{OF_FLUX} {STREAMS}mod.lin single_blocks.{{0,1,2}}.modulation.lin",
    "chroma": OF_FLUX,
    "kontext": OF_FLUX,
    "flux_2": OF_FLUX,
    "flux_3": "{content_mode_blocks.image,content_mode_blocks.image_cond,txt_mode_blocks}.{0,1}."
    "{q_proj,k_proj,v_proj,attn_out,mlp_in,mlp_out} "
    "single_blocks.{0,1,2}.{q_proj,k_proj,v_proj,attn_out,mlp_in,mlp_out}",
    "lumina": "{noise_refiner.0,context_refiner.0,layers.0,layers.1}.attention.{qkv,out} "
    "{noise_refiner.0,context_refiner.0,layers.0,layers.1}.feed_forward.{w1,w2,w3} "
    "{noise_refiner.0,layers.0,layers.1,final_layer}.adaLN_modulation.1 final_layer.linear",
    "qwen_image": OF_QWEN,
    "qwen_image_21": "transformer_blocks.{0,1}.attn.{to_q,to_k,to_v,to_out.0} "
    "transformer_blocks.{0,1}.img_mlp.{proj,gate_layer,out}",
    "moss_image": "layers.{0,1}.proj.{q,k,v,o,ffn_up_gate,ffn_down}",
    "fibo_2": "{noise_refiner.0,layers.0,layers.1,layers.2}.attention.{to_q,to_k,to_v,to_out.0} "
    "{layers.0,layers.2,perceiver.layers.0}.cross_attention.{to_q,to_k,to_v,to_out.0} "
    "perceiver.layers.0.self_attention.{to_q,to_k,to_v,to_out.0} perceiver.layers.0.ffn.{w1,w2,w3} "
    "{noise_refiner.0,layers.0,layers.1,layers.2}.feed_forward.{w1,w2,w3}",
    "ernie_image": "layers.{0,1}.self_attention.{to_q,to_k,to_v,to_out.0} "
    "layers.{0,1}.mlp.{gate_proj,up_proj,linear_fc2}",
    "hidream_o1": "language_model.layers.{0,1}.self_attn.{q,k,v,o}_proj "
    "language_model.layers.{0,1}.mlp.{gate,up,down}_proj x_embedder.{proj1,proj2} final_layer2.linear",
    "hunyuan_video_15": f"{STREAMS}{{attn_q,attn_k,attn_v,attn_proj,mlp.fc1,mlp.fc2,mod.linear}}",
    "ideogram4": "layers.{0,1}.attention.{qkv,o} layers.{0,1}.feed_forward.{w1,w2,w3}",
    "kandinsky": "{text,visual}_transformer_blocks.{0,1}.self_attention.{to_query,to_key,to_value,out_layer} "
    "{text,visual}_transformer_blocks.{0,1}.feed_forward.{in_layer,out_layer} "
    "visual_transformer_blocks.{0,1}.cross_attention.{to_query,to_key,to_value,out_layer}",
    "kandinsky_6": "{video,audio}_text_transformer_blocks.{0,1}.self_attention.{to_query,to_key,to_value} "
    "{video,audio}_text_transformer_blocks.{0,1}.self_attention.out_layer "
    "{video,audio}_text_transformer_blocks.{0,1}.feed_forward.{in_layer,out_layer} "
    "visual_blocks.{0,1}.{videoT,audioT}.{self_attention,cross_attention}.{to_query,to_key,to_value} "
    "visual_blocks.{0,1}.{videoT,audioT}.{self_attention,cross_attention}.out_layer "
    "visual_blocks.{0,1}.{videoT,audioT}.feed_forward.{in_layer,out_layer} "
    "visual_blocks.{0,1}.{va_cross_attention,av_cross_attention}.{to_query,to_key,to_value,out_layer}",
    "z_image": "layers.{0,1}.attention.{to_q,to_k,to_v,to_out.0} layers.{0,1}.feed_forward.{w1,w2,w3}",
    "krea2": "blocks.{0,1}.attn.{wq,wk,wv,gate,wo} blocks.{0,1}.mlp.{gate,up,down} "
    "txtfusion.{layerwise,refiner}_blocks.{0,1}.attn.{wq,wk,wv,gate,wo} "
    "txtfusion.{layerwise,refiner}_blocks.{0,1}.mlp.{gate,up,down} "
    "txtfusion.projector first last.linear tmlp.{0,2} txtmlp.{1,3} tproj.1",
    "ltx_2 with sound": "transformer_blocks.{0,1}.{attn1,attn2,audio_attn1,audio_attn2,audio_to_video_attn,"
    "video_to_audio_attn}.{to_q,to_k,to_v,to_out.0}",
}


def expand(text: str) -> set[str]:
    """`a.{0,1}.b` -> our names of `a.0.b` and `a.1.b`; of several words."""
    found = set()
    for word in text.split():
        pieces = re.split(r"\{(.*?)\}", word)
        choices = [piece.split(",") if index % 2 else [piece] for index, piece in enumerate(pieces)]
        found |= {"lora_unet_" + "".join(parts).replace(".", "_") for parts in product(*choices)}
    return found


def names_of(dit: nn.Module, module: str, **given: Any) -> list[str]:
    options = NetworkOptions(network_module=module, network_alpha=1.0, **given)
    return list(make_network(options, module, dit, seed=1).names)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", LEARNING)
def test_every_kind_of_network_learns_in_the_modules_of_the_family(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, dit = load_transformer(name, tmp_path, monkeypatch)
    own = family.lora_module

    for module in (own, "networks.lora", "networks.loha", "networks.lokr"):
        assert set(names_of(dit, module)) == expand(LEARNING[name]), module
    if name == "kontext":
        modulations = expand(f"{STREAMS}mod.lin single_blocks.{{0,1,2}}.modulation.lin")
        asked = ("include_patterns=['.*mod.*']",)
        assert set(names_of(dit, own, network_args=asked)) == expand(OF_FLUX) | modulations
        asked = ("img_mod_dim=2",)  # a rank asks for them too
        assert len(names_of(dit, own, network_args=asked)) == 22 + 2


@pytest.mark.parametrize("module", ["networks.lora_qwen_image", "networks.loha", "networks.lokr"])
def test_modules_that_only_the_file_to_begin_with_has_join_the_network(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, dit = load_transformer("qwen_image", tmp_path, monkeypatch)
    options = NetworkOptions(network_module=module, network_args=("include_patterns=['.*_mod.*']",))
    written = make_network(options, module, dit, seed=2).module.state_dict()  # as the known trainer's
    save_file(written, "theirs.safetensors")
    begun = NetworkOptions(network_module=module, network_weights=Path("theirs.safetensors"))

    caplog.set_level(logging.INFO)
    network = make_network(begun, module, dit, seed=1).module

    found = network.state_dict()
    assert len({name.partition(".")[0] for name in found}) == 28
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], written[name]) for name in written)
    assert "4 modules that are not selected by default" in caplog.text
    assert "is not in this network" not in caplog.text
    # a state of this run is loaded without the file, and by the same order of parameters
    resumed = make_network(NetworkOptions(network_module=module), module, dit, 3, resumed=found).module
    assert [name for name, _ in resumed.named_parameters()] == [
        name for name, _ in network.named_parameters()
    ]
    less = replace(begun, network_args=("exclude_patterns=['.*img_mod.*']",))
    assert len(make_network(less, module, dit, seed=1).names) == 26  # type: ignore[union-attr]
    assert "lora_unet_transformer_blocks_0_img_mod_1 is not in this network" in caplog.text
