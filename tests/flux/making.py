"""FLUX.1 and Chroma transformers of the recorded cases, and tiny ones here and in diffusers."""

from typing import Any

from torch import Tensor

from flux.configs import ApproximatorConfig, FluxConfig
from flux.model import FluxModel
from tests.golden_cases import make_weights, read_case


def golden_model(case: str, weights_of: str = "") -> tuple[FluxModel, dict[str, Any], dict[str, Tensor]]:
    """The model of a recorded case, its description and its tensors. weights_of: the case that has a model."""
    description, tensors = read_case(case)
    model_description = read_case(weights_of)[0] if weights_of else description
    sizes = model_description["config"]
    is_chroma = "approximator_in_dim" in sizes
    config = FluxConfig(
        dim=sizes["hidden_size"],
        ffn_dim=int(sizes["hidden_size"] * sizes["mlp_ratio"]),
        num_heads=sizes["num_heads"],
        double_blocks=sizes["depth"],
        single_blocks=sizes["depth_single_blocks"],
        token_dim=sizes["in_channels"],
        text_dim=sizes["context_in_dim"],
        pooled_dim=sizes.get("vec_in_dim", 0),
        has_guidance=sizes["guidance_embed"] and not is_chroma,
        approximator=ApproximatorConfig(
            sizes["approximator_in_dim"], sizes["approximator_hidden_size"], sizes["approximator_depth"]
        )
        if is_chroma
        else None,
    )
    model = FluxModel(config)
    model.load_state_dict(make_weights(model_description["weights_model_key"], model_description["weights"]))
    return model.eval().requires_grad_(False), description, tensors
