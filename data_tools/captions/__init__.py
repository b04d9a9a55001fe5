"""Write captions with a vision-language model, here or on a server, and edit captions.

asking: frames, prompts, answers: what models and servers share
formats: captions as JSON objects: prompt, answer, wording
local_model: describe media with a vision-language model here
options: options of tools/caption_dataset.py: frames, prompt, wording
places: places of captions, their writers, captions to make
run: write or edit captions after the options are read
server: describe media through an OpenAI-compatible server
"""
