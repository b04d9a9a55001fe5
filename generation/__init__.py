"""From options and a prompt to videos and images; read run.py first.

latent_masks: hold parts of an image to a reference
asking: ask for lines at the console, with history
comparing: every prompt with every LoRA at every strength
conversation: the prompts that a user types at the console
denoise: the denoising loop over sections: passes, guidance, solver
network_setup: how networks and LoRAs are loaded, and features around them
json_requests: requests as JSON, for a page that drives it
embedding_marks: embeddings of a generation, and their marks in prompts
expert_memory: host memory of experts that wait
experts: the networks that denoise, and take turns
grid_options: options of sheets and of tools/compare.py
line_options: long names of options in prompt and sample lines
making: make the videos of jobs: texts, denoising, pixels, files
memory: predict memory by rehearsing each phase
named_prompts: JSON prompts from files, `@caption.json`
options: options of the generation scripts that all families share
merged_models: the transformer with LoRAs merged into it
outputs: output files: latents, videos, images, and names
progress: boxes, lines, and a preview that grows by sections
prompt_lines: prompt lines: `a cat --w 832 --d 7`
request: from options and a prompt line to a job
run: modes of a generation script: one, file, interactive, others
saved_latents: decode latent files to videos and images
sample_lines: prompt files of training samples
script_options: options of requests and outputs; forms of scripts
scripts: make the generation scripts of a family
loaded_networks: networks of a run: loaded when needed, by turns
sheets: clips side by side; sheets of varied options
multi_process: generate in processes that share the transformer
"""
