"""What a model family provides to the shared loops: read family.py first.

bundled_embeddings: words for prompts that LoRA files contain
caption_formats: keys of captions that are JSON objects, and their faults
data: records of latents, batches and cache entries
family: the protocols that loops call, and noise conventions
families: families by name: places, scripts, kinds of files
few_steps: names of transformers that were distilled to few steps
inputs: where a video starts, what a teacher sees, by name
loading: records of how and where a network is loaded
family_networks: networks that a family trains instead of LoRAs
new_tokens: a new word whose vectors are trained
one_frame: settings of --one_frame_inference, for two families
requests: requests, their prepared form, and shared checks
rules: experts, releases, sources, guidance, token limits of a model
steps: sections, one call of the network, one step
full_model: training all weights of a checkpoint of several networks
workflows: the nodes of ComfyUI that make a family's samples
"""
