"""LoRAs and similar adapters: train, read, convert, merge and extract them.

adapter: the trainer's interface to a network, ours or foreign
gated_loras: wrap modules with LoRAs that are switched on
alphas: find alphas in metadata or PEFT's settings
apply: merge LoRAs into weights while they are loaded
averaging: average the saved files of a finished run
cast_factors: cast LoRA factors to autocast's dtype, once a pass
baking: convert networks of other kinds to plain LoRAs
block_numbers: ranks and learning rates by block number
convert: convert LoRA files to another program's names
check_lora_weights: command: print the size of a LoRA's weights
convert_anima_lora_to_comfy: command: Anima LoRAs to ComfyUI's names, or back
convert_flux_lora: command: FLUX.1 LoRAs between sd-scripts' and diffusers' names
convert_hunyuan_image_lora_to_comfy: command: HunyuanImage-2.1 LoRAs to ComfyUI's names, or back
convert_z_image_lora_to_comfy: command: Z-Image LoRAs to ComfyUI's names, or back
depth_variants: fit LoRAs to deeper variants of their model
delta: the change that a module's factors make
deltas: group factors by module; ranks, alphas and biases
extract_lora_from_models: command: a LoRA from any fine-tuned model
extracting: extract a LoRA from a fine-tuned model
factored: the trained layer of LoHa and LoKr
flux_extract_lora: command: a LoRA from a fine-tuned FLUX.1 or Chroma
flux_merge_lora: command: merge LoRAs of FLUX.1 or Chroma
fused_rows: rows of fused weights, stacked or interleaved by head
formats: tensor names in the files that training saves
joined_weights: frozen weights of q, k and v, adjacent in memory
key_formats: rename tensors from any program's names to ours
kinds/: each kind of network: LoRA, DoRA, LoHa, LoKr, OFT, T-LoRA
unused_tensors: describe unused tensors in LoRA files
loading: read LoRA files with any program's names
lora_layer: one LoRA layer: its addition and its dropout
lora_network: the trained network, in DiT and text encoders
lora_products: compute LoRA layers: products in place, noise
lora_settings: rank, alpha, dropout and arguments of a network
magnitudes: convert DoRA magnitudes to ComfyUI's norms and back
merge_lora: command: merge LoRAs of Stable Diffusion checkpoints, by another name
merging: add LoRAs to model files or to each other
metadata: expert, checksums and description of LoRA files
module_names: look up modules by their names in LoRA files
multipliers: LoRA files with a multiplier after a colon
names/: module names of each family in every layout
options: options to train a network
own_kinds: our network modules by name, and their settings
own_modules: build the networks of our values of --network_module
fused_parts: split and join LoRAs for fused weights
patterns: regular expressions for module names, with dots or underscores
predictions: what a model predicts according to its metadata
rank_masks: mask ranks by the noise level of each sample
resize_lora: command: reduce the rank of a LoRA
resizing: the best factors of a smaller rank
rewriting: rearrange other programs' factors into one LoRA per module
rounding: round merged weights to 16 bits, nearest or stochastic
sdxl_merge_lora: command: merge LoRAs of Stable Diffusion checkpoints
shared_inputs: LoRAs for q, k and v multiply their input once
svd_merge_lora: command: merge LoRAs into one of a smaller rank
svd_merging: merge LoRAs into one of a smaller rank
tensor_names: prefixes and endings that programs add to module paths
text_loras: merge LoRAs into text encoders and full checkpoints
train/: the trained layers of each kind of network
tool_options: options to merge and extract LoRAs
use_options: options to add LoRAs to a model
unmerged_loras: wrap quantized layers with LoRAs, and masked LoRAs
weight_checking: report the magnitude of a LoRA's weights
writing: write LoRAs under ComfyUI's and diffusers' names
"""
