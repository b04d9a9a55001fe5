"""LoRAs and their like: train, read, convert, merge and extract them.

adapter: the trainer's interface to a network, ours or foreign
gated_loras: LoRAs around modules that act at times
alphas: scales that are next to the tensors
apply: put LoRAs into weights while they are loaded
averaging: average saved files of a run after it
cast_factors: factors of LoRAs in autocast's dtype, once a pass
baking: plain LoRAs from networks of other kinds
block_numbers: ranks and rates by numbers of a model's blocks
convert: LoRA files in another dialect; join, split experts
check_lora_weights: command: print the size of a LoRA's weights
convert_anima_lora_to_comfy: command: Anima LoRAs to ComfyUI's names, or back
convert_flux_lora: command: FLUX.1 LoRAs between sd-scripts' and diffusers' names
convert_hunyuan_image_lora_to_comfy: command: HunyuanImage-2.1 LoRAs to ComfyUI's names, or back
convert_z_image_lora_to_comfy: command: Z-Image LoRAs to ComfyUI's names, or back
depth_variants: LoRAs for deeper variants of their model
delta: what the factors of a module add to a weight
deltas: factors by module, their ranks and strengths
extract_lora_from_models: command: a LoRA from any fine-tuned model
extracting: the low-rank change of a fine-tuned model
factored: the layer of networks that are products of factors
factored_networks: build such layers, also like those of files
flux_extract_lora: command: a LoRA from a fine-tuned FLUX.1 or Chroma
flux_merge_lora: command: merge LoRAs of FLUX.1 or Chroma
fused_rows: rows of fused weights, stacked or interleaved by head
formats: names of the files that a training saves
joined_weights: frozen weights of q, k and v, together in memory
key_formats: bring files of any dialect under our names
kinds/: each kind of network: LoRA, DoRA, LoHa, LoKr, OFT, T-LoRA
unused_tensors: what tensors of LoRA files that are not used
loading: read LoRA files of any dialect, with strength and patterns
lora_layer: one LoRA layer: its addition and its dropouts
lora_network: the LoRAs of a training, in DiT and encoders
lora_products: the computation of LoRA layers: products, noise
lora_settings: dimension, alpha, dropout and arguments of a network
merge_lora: command: merge LoRAs of Stable Diffusion checkpoints, by another name
merging: add LoRAs to model files or to each other
metadata: experts, checksums and description of files
module_names: modules by their names in LoRA files
multipliers: LoRA files with a number behind a colon
names/: module names of each family in every layout
options: options to train a network
own_kinds: our network modules by name, and their settings
own_modules: networks of `--network_module networks.lora` and the like
fused_parts: LoRAs of split fused weights: split and join
patterns: regular expressions for names of modules, with dots or underscores
predictions: what files say that their model predicts
rank_masks: which ranks act, by the noise of each sample
resize_lora: command: fewer ranks for a LoRA
resizing: the best factors of a smaller rank
rewriting: arrangements of other programs into usual ones
rounding: merged weights in 16 bits, nearest or at random
sdxl_merge_lora: command: merge LoRAs of Stable Diffusion checkpoints
shared_inputs: LoRAs for q, k and v multiply their input once
svd_merge_lora: command: merge LoRAs into one of a smaller rank
svd_merging: merge LoRAs into one of a smaller rank
tensor_names: dialects: what stands before and behind modules' paths
text_loras: LoRAs of text encoders, and words that they bring
tool_options: options to merge and extract LoRAs
use_options: options to add LoRAs to a model
unmerged_loras: LoRAs around layers in 8 or 4 bits, masked ones
weight_checking: size of a LoRA's weights
writing: write the dialects of ComfyUI and diffusers
"""
