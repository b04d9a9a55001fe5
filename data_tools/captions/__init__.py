"""Write captions with a vision-language model, here or on a server, and edit captions.

asking: frames, question, answer: what all makers share
formats: captions as JSON objects: question, answer, words
local_model: describe media with a vision-language model here
options: options of tools/caption_dataset.py: frames, question, words
places: places of captions, their writers, captions to make
run: write or edit captions after the options are read
server: describe media through an OpenAI-compatible server
"""
