"""The states of CLIP's text tower against those of transformers."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from encoders.clip_checkpoints import ClipTextConfig
from encoders.clip_layers import ClipText

LAYERS, VOCABULARY, END = 3, 90, 88
IDS = torch.tensor([[87, 5, 6, 7, END, END, END], [87, 9, END, 0, 0, 0, 0]])  # padded like CLIP-L, OpenCLIP
ENDS = torch.tensor([4, 2])


def towers(activation: str) -> tuple[ClipText, CLIPTextModelWithProjection]:
    """Ours and that of transformers, with the same weights."""
    torch.manual_seed(5)
    theirs = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            projection_dim=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            hidden_act=activation,
            eos_token_id=END,
            bos_token_id=87,
            pad_token_id=0,
        )
    ).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = ClipText(ClipTextConfig(VOCABULARY, 77, 64, 128, 2, LAYERS, activation))
    state = {
        name.removeprefix("text_model."): tensor
        for name, tensor in theirs.state_dict().items()
        if not name.endswith(("position_ids", "text_projection.weight"))
    }
    ours.load_state_dict(state)
    return ours.eval(), theirs


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_states_and_pooled_states_are_those_of_transformers(activation: str) -> None:
    ours, theirs = towers(activation)
    expected = theirs(IDS, output_hidden_states=True)
    norm = theirs.text_model.final_layer_norm
    for layer in range(1, LAYERS + 1):
        state = expected.hidden_states[-layer]
        found, pooled = ours.states(IDS, layer, ends=ENDS)
        assert pooled is not None
        torch.testing.assert_close(found, state, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            pooled @ theirs.text_projection.weight.T, expected.text_embeds, atol=1e-5, rtol=0
        )
        normed, none = ours.states(IDS, layer, final_norm=True)
        assert none is None
        torch.testing.assert_close(normed, norm(state), atol=1e-5, rtol=0)
        assert torch.equal(pooled, ours(IDS, ENDS))


@torch.no_grad()
def test_layers_behind_the_wanted_one_run_only_for_the_pooled_state() -> None:
    ours, _ = towers("gelu")
    runs: list[int] = []
    for index, layer in enumerate(ours.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    ours.states(IDS, 2)
    assert runs == [0, 1]
    ours.states(IDS, 2, ends=ENDS)
    assert runs == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("layer", [0, LAYERS + 1])
def test_a_layer_that_is_not_there_is_an_error(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} "):
        towers("gelu")[0].states(IDS, layer)
