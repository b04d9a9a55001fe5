"""What a model family tells the shared loops: read family.py first.

bundled_embeddings: words for prompts that LoRA files bring along
caption_formats: keys of captions that are JSON objects, and their faults
data: records of latents, and what caches hand over
family: protocols that loops call, and how models learn
families: families by name: places, scripts, kinds of files
few_steps: names of transformers that were distilled to few steps
inputs: where a video starts, what a teacher sees, by name
loading: records of how and where a network is loaded
family_networks: networks that a family trains in place of LoRAs
new_tokens: a new word whose vectors a training learns
one_frame: words of --one_frame_inference, of two families
requests: what is asked for, settled, and checked alike
rules: experts, releases, sources, guidance, token limits of a model
steps: sections, one call of the network, one step
full_model: training all weights of a checkpoint of several networks
workflows: the nodes of ComfyUI that make a family's samples
"""
