"""From options and a prompt to videos and pictures; read run.py first.

asking: ask for lines at the console, with history
compare_options: options of tools/compare.py besides those of the family's generation script
comparing: every prompt with every LoRA at every strength
decoding: from latents to videos and images
denoise: the denoising loop: passes, guidance, solver
dressing: how networks are loaded, and features around them
expert_loras: which LoRAs each expert of a model gets
expert_memory: host memory of experts that wait
expert_options: options of models with two experts
experts: the networks that denoise, and take turns
grids: show clips side by side: page, picture or video
growing: preview file that grows with each finished section
jobs: jobs of a run: those to do, and those done
making: make the videos of jobs: texts, denoising, pixels
memory: predict memory by rehearsing each phase
options: options of the generation scripts that all families share
output_options: options of output files: form and place
outputs: output files: latents, videos, images, and names
post_options: option of the tools behind the decoder
preset: what --optimized turns on, if available here
preset_options: --optimized: options for speed that are turned on together
progress: console output: boxes, bars and lines
prompt_lines: prompt lines: `a cat --w 832 --d 7`
request: from options and a prompt line to a request
request_options: options of each video: what to make
run: modes of a generation script: one, file, interactive, others
script_options: what the shared options are in one family's script
scripts: make the generation scripts of a family
sections: from a checked request to clean latents
session: networks of a run: loaded when needed, by turns
sheet_options: options of sheets: varied options and values
sheets: one prompt with all values of options, as picture
"""
