"""Anima's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names import layouts
from networks.names.layouts import DepthVariants, FamilyNames, LoraRules, renamed_parts
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "anima",
    script="anima",
    cache="anima_cache",
    record="Anima",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--qwen3 QWEN3_FILE",
    same_latents="qwen_image",
)
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_BLOCK = (
    *(
        (f"{theirs}.to_{ours[0]}", f"{attention}.{ours}")
        for theirs, attention in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for ours in _ATTENTION
    ),
    ("attn1.to_out.0", "self_attn.output_proj"),
    ("attn2.to_out.0", "cross_attn.output_proj"),
    ("ff.net.0.proj", "mlp.layer1"),
    ("ff.net.2", "mlp.layer2"),
    *(
        (f"norm{number}.linear_{layer}", f"adaln_modulation_{branch}.{layer}")
        for number, branch in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp"))
        for layer in (1, 2)
    ),
    *(
        (f"{theirs}.norm_{letter}", f"{attention}.{letter}_norm")
        for theirs, attention in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for letter in "qk"
    ),
)
_OUTSIDE = (
    ("patch_embed.proj", "x_embedder.proj.1"),
    ("time_embed.t_embedder.linear_1", "t_embedder.1.linear_1"),
    ("time_embed.t_embedder.linear_2", "t_embedder.1.linear_2"),
    ("time_embed.norm", "t_embedding_norm"),
    ("norm_out.linear_1", "final_layer.adaln_modulation.1"),
    ("norm_out.linear_2", "final_layer.adaln_modulation.2"),
    ("proj_out", "final_layer.linear"),
)
_ADAPTER_ATTENTION = (*_ATTENTION, "o_proj", "q_norm", "k_norm")
_ADAPTER_BLOCK = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in _ADAPTER_ATTENTION),
    "mlp.0",
    "mlp.2",
    "norm_self_attn",
    "norm_cross_attn",
    "norm_mlp",
)
_ADAPTER = "llm_adapter."
_CONDITIONER = "text_conditioner."  # what diffusers calls the adapter, next to the transformer
_ORDER = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.output_proj "
    "cross_attn.q_proj cross_attn.k_proj cross_attn.v_proj cross_attn.output_proj mlp.layer1 mlp.layer2"
)
_ADAPTER_ORDER = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "cross_attn.q_proj cross_attn.k_proj cross_attn.v_proj cross_attn.o_proj mlp.0 mlp.2"
)

# metadata of LoRA files; the first is SwarmUI's
SOURCE_BLOCKS = ("modelspec.anima_source_blocks", "anima_source_blocks")
GROWN = DepthVariants(
    "blocks",
    other_list_names=("transformer_blocks",),
    depths=(28, 40, 52),
    repeated_blocks=frozenset({1, 3, 5, 7, 9, 11, 14, 16, 18, 20, 22, 24}),
    keys=SOURCE_BLOCKS,
)
ANIMA = FamilyNames(
    "anima",
    "anima-preview",
    parts=(
        *renamed_parts("transformer_blocks.{n}.", "blocks.{n}.", _BLOCK),
        *renamed_parts("", "", _OUTSIDE),
        *renamed_parts(
            f"{_CONDITIONER}blocks.{{n}}.",
            f"{_ADAPTER}blocks.{{n}}.",
            ((name, name) for name in _ADAPTER_BLOCK),
        ),
        *renamed_parts(_CONDITIONER, _ADAPTER, ((name, name) for name in ("out_proj", "norm", "embed"))),
    ),
    version_prefixes=("anima",),
    encoders=(("lora_te", layouts.LANGUAGE_MODEL_LAYER_PREFIX),),
    texts_in_comfyui=(("lora_te_", "text_encoders.qwen3_06b.transformer.model."),),
    relative_sizes=(
        *((f".blocks.{{n}}.{attention}.q_proj", 1, 1) for attention in ("self_attn", "cross_attn")),
        *((f".blocks.{{n}}.{attention}.output_proj", 1, 1) for attention in ("self_attn", "cross_attn")),
        *((f".blocks.{{n}}.self_attn.{letter}_proj", 1, 1) for letter in "kv"),
        (".mlp.layer1", 4, 1),
        (".mlp.layer2", 1, 4),
    ),
    released_sizes=tuple((2048, (("blocks", depth),)) for depth in GROWN.depths),
    depth_variants=GROWN,
    optimizer_numbering=(("blocks.{n}.", _ORDER), (f"{_ADAPTER}blocks.{{n}}.", _ADAPTER_ORDER)),
    network_module="networks.lora_anima",
    rules=LoraRules(module_switches={"train_llm_adapter": f".{_ADAPTER}blocks."}),
    unprefixed_paths=(_CONDITIONER,),
)
LORA = (ANIMA,)
MARKS: Marks = (
    ("llm_adapter.out_proj.weight", "an Anima transformer (--pretrained_model_name_or_path, --dit)"),
    ("x_embedder.proj.1.weight", "a transformer of Cosmos-Predict2 or Anima, without Anima's adapter"),
    (
        "time_embed.t_embedder.linear_1.weight",
        "a transformer of Cosmos-Predict2 or Anima in diffusers layout, without Anima's adapter",
    ),
    ("blocks.0.norm_cross_attn.weight", "Anima's adapter (--llm_adapter_path)"),
)
