"""HiDream-O1-Image's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names import layouts
from networks.names.layouts import FamilyNames, with_endings
from protocols.families import FamilyEntry, Marks

ENTRY = FamilyEntry(
    "hidream_o1",
    script="hidream_o1",
    cache="hidream_o1_cache",
    record="HiDreamO1",
    encoders=(),
    texts="--dit DIT_FILE",
)
_BLOCK = "language_model.layers.{n}."
# in the order of registration
_LAYERS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_MODULES = (
    *(f"{_BLOCK}{layer}" for layer in _LAYERS),
    *with_endings("", "x_embedder.proj1 x_embedder.proj2 final_layer2.linear"),
    *with_endings(_BLOCK, "self_attn.q_norm self_attn.k_norm input_layernorm post_attention_layernorm"),
    *with_endings("", "t_embedder1.mlp.0 t_embedder1.mlp.2 language_model.norm language_model.embed_tokens"),
)
# the vision tower, which only edits have
_TOWER = (
    *with_endings("visual.blocks.{n}.", "attn.qkv attn.proj mlp.linear_fc1 mlp.linear_fc2 norm1 norm2"),
    *with_endings("visual.merger.", "linear_fc1 linear_fc2 norm"),
    *with_endings("visual.deepstack_merger_list.{n}.", "linear_fc1 linear_fc2 norm"),
    *with_endings("visual.", "patch_embed.proj pos_embed"),
)
HIDREAM_O1 = FamilyNames(
    "hidream_o1",
    "HiDream-O1-Image",
    # the class's names in the released folder, and musubi-tuner's in LoRA files
    aliases=tuple((f"model.{path}", path) for path in (*_MODULES, *_TOWER)),
    optional_paths=_TOWER,
    optional_description="the vision tower, which the model has only with --task i2i",
    is_as_in_diffusers=True,
    underscored_names="aliases",
    dotted_in_comfyui=True,
    default_format=layouts.COMFYUI,
    version_prefixes=("hidream_o1", "hidream-o1", "hidream o1", "hidreamo1"),
    relative_sizes=(
        *((f".self_attn.{name}_proj", 1, 1) for name in "qo"),
        *((f".self_attn.{name}_proj", 1 / 4, 1) for name in "kv"),
        *((f".mlp.{name}_proj", 3, 1) for name in ("gate", "up")),
        (".mlp.down_proj", 1, 3),
    ),
    released_sizes=((4096, (("language_model.layers", 36),)),),
    optimizer_numbering=((_BLOCK, " ".join(_LAYERS)),),
    network_module="networks.lora_hidream_o1",
)
LORA = (HIDREAM_O1,)
MARKS: Marks = tuple(
    (f"{start}x_embedder.proj1.weight", "a HiDream-O1-Image network (hidream_o1_*.py, --dit)")
    for start in ("", "model.")
)
