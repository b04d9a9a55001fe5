"""Captions written by a vision-language model, and edited: where they go, who makes them, what they say.

answers: what makers of captions share: frames in, text out
backups: keep what a person wrote before it is replaced
drawing: draw words, decided by seed and described media alone
editing: edit captions that are there: replace texts, put words in
lists: put captions into a JSONL list, always whole
local_model: describe media with a vision-language model here
looking: the frames of a media file for the model
made: list of captions that this program wrote
options: options of tools/caption_dataset.py: frames, question, words
places: where captions stand: files, or lines of a list
planning: which captions are made: missing ones, or others
processors: load what makes a model's inputs from texts and images
run: run tools/caption_dataset.py after its options are read
server: describe media through an OpenAI-compatible server
wording: turn an answer into one line, with words put in
writing: write captions, never over one of a person
"""
