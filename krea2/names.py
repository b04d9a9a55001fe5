"""Krea 2's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names.layouts import FamilyNames, renamed_parts
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "krea2",
    script="krea2",
    cache="krea2_cache",
    record="Krea2",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder QWEN3_VL_FILE",
    spelled=(("infer_steps", "--steps"),),
    same_latents="qwen_image",
)
_TEXT_BLOCKS = ("layerwise_blocks.{n}.", "refiner_blocks.{n}.")
# beginnings of blocks, diffusers' and the released
_BLOCKS = (
    ("transformer_blocks.{n}.", "blocks.{n}."),
    *((f"text_fusion.{block}", f"txtfusion.{block}") for block in _TEXT_BLOCKS),
)
_LAYERS = (
    *((f"attn.to_{theirs}", f"attn.{ours}") for theirs, ours in (("q", "wq"), ("k", "wk"), ("v", "wv"))),
    ("attn.to_gate", "attn.gate"),
    ("attn.to_out.0", "attn.wo"),
    *((f"ff.{name}", f"mlp.{name}") for name in ("gate", "up", "down")),
)
# order in which the layers are registered
_ORDER = "attn.wq attn.wk attn.wv attn.gate attn.wo mlp.gate mlp.up mlp.down"
_NORMS = (
    *((f"norm{number}.weight", f"{ours}norm.scale") for number, ours in ((1, "pre"), (2, "post"))),
    *((f"attn.norm_{letter}.weight", f"attn.qknorm.{letter}norm.scale") for letter in "qk"),
)
_OUTSIDE = (
    ("img_in", "first"),
    ("final_layer.linear", "last.linear"),
    ("time_mod_proj", "tproj.1"),
    *((f"time_embed.linear_{number}", f"tmlp.{layer}") for number, layer in ((1, 0), (2, 2))),
    *((f"txt_in.linear_{number}", f"txtmlp.{layer}") for number, layer in ((1, 1), (2, 3))),
    ("text_fusion.projector", "txtfusion.projector"),
)
KREA_2 = FamilyNames(
    "krea2",
    "Krea-2",
    parts=(
        *(part for theirs, ours in _BLOCKS for part in renamed_parts(theirs, ours, _LAYERS)),
        *renamed_parts("", "", _OUTSIDE),
    ),
    parameters=(
        *((theirs + one, ours + other) for theirs, ours in _BLOCKS for one, other in _NORMS),
        ("txt_in.norm.weight", "txtmlp.0.scale"),
        ("final_layer.norm.weight", "last.norm.scale"),
        ("transformer_blocks.{n}.scale_shift_table", "blocks.{n}.mod.lin"),
        ("final_layer.scale_shift_table", "last.modulation.lin"),
    ),
    version_prefixes=("krea2", "krea-2", "krea_2"),
    # for the blocks over the image: the text's have another width and other heads
    relative_sizes=(
        *((f".blocks.{{n}}.attn.{name}", 1, 1) for name in ("wq", "gate", "wo")),
        *((f".blocks.{{n}}.attn.{name}", 1 / 4, 1) for name in ("wk", "wv")),
        *((f".blocks.{{n}}.mlp.{name}", 8 / 3, 1) for name in ("gate", "up")),
        (".blocks.{n}.mlp.down", 1, 8 / 3),
    ),
    released_sizes=((6144, (("blocks", 28),)),),
    optimizer_numbering=(
        ("", "first"),
        ("blocks.{n}.", _ORDER),
        ("tmlp.", "0 2"),
        ("txtfusion.layerwise_blocks.{n}.", _ORDER),
        ("txtfusion.", "projector"),
        ("txtfusion.refiner_blocks.{n}.", _ORDER),
        ("txtmlp.", "1 3"),
        ("last.", "linear"),
        ("tproj.", "1"),
    ),
    network_module="networks.lora_krea2",
    unsupported_loras=(
        (
            # the extension of ai-toolkit that trains them calls its architecture so
            r"^(?!ss_network_module=networks\.).*(identity[ _-]?edit|krea2_edit .*ai-toolkit)",
            "its metadata says that it is an identity edit, whose references have the timestep of the image "
            "and precede it, which is not supported. Use a LoRA of ai-toolkit's own edits, or of --edit.",
        ),
    ),
)
LORA = (KREA_2,)
MARKS: Marks = (
    ("txtfusion.projector.weight", "a Krea 2 transformer (--dit)"),
    ("text_fusion.projector.weight", "a Krea 2 transformer in diffusers layout (--dit)"),
)
