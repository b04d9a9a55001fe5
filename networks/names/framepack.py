"""Module names of FramePack, whose own layout is that of diffusers."""

from networks.names.layouts import IN_DIFFUSERS, FamilyNames, each

FRAMEPACK = FamilyNames(
    "framepack",
    "framepack",
    (
        *each(
            "transformer_blocks.{n}.attn.",
            "to_q to_k to_v add_q_proj add_k_proj add_v_proj to_out.0 to_add_out",
        ),
        *each("transformer_blocks.{n}.attn.", "norm_q norm_k norm_added_q norm_added_k"),
        *each(
            "transformer_blocks.{n}.",
            "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2 norm1.linear norm1_context.linear",
        ),
        *each(
            "single_transformer_blocks.{n}.",
            "attn.to_q attn.to_k attn.to_v proj_mlp proj_out norm.linear attn.norm_q attn.norm_k",
        ),
        *each(
            "context_embedder.token_refiner.refiner_blocks.{n}.",
            "attn.to_q attn.to_k attn.to_v attn.to_out.0",
        ),
        *each("context_embedder.token_refiner.refiner_blocks.{n}.", "ff.net.0.proj ff.net.2 norm_out.linear"),
        "context_embedder.proj_in",
        *each("context_embedder.time_text_embed.timestep_embedder.", "linear_1 linear_2"),
        *each("context_embedder.time_text_embed.text_embedder.", "linear_1 linear_2"),
        *(
            f"time_text_embed.{vector}_embedder.{layer}"
            for vector in ("timestep", "guidance", "text")
            for layer in ("linear_1", "linear_2")
        ),
        *each("clean_x_embedder.", "proj proj_2x proj_4x"),
        *each("", "x_embedder.proj image_projection.up image_projection.down norm_out.linear proj_out"),
    ),
    takes=("hunyuan_video",),
    # as diffusers' HunyuanVideoFramepackPipeline needs it; with another start it loads no layer
    start=IN_DIFFUSERS,
    converted_for="diffusers",
    is_as_in_diffusers=True,
)
