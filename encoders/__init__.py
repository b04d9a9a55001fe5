"""Text encoders and autoencoders that several families have: read clip_l.py for the shape of one.

autoencoder: FLUX's autoencoder: pixels to latents and back
autoencoder_blocks: layers of FLUX's autoencoder
autoencoder_checkpoints: files of FLUX's autoencoder: dialects, dimensions
autoencoder_colours: latents of FLUX's autoencoder as colours, for previews
byt5: ByT5: the letters that a picture shows
clip_checkpoints: files of CLIP-L's text tower
clip_l: CLIP-L for the shared loops: a vector per prompt
clip_layers: transformer layers of CLIP and SigLIP towers
clip_text: CLIP's text tower: states of a prompt
clip_tokenizer: CLIP's tokenizer, exactly as its files say
clip_vision: CLIP's image tower with its projection
clip_vision_checkpoints: files of CLIP's image towers: dimensions
pictures: cache entries of single pictures, for all image families
piece_tokenizers: SentencePiece tokenizers, from wherever they may lie
posterior: latents drawn from what an encoder gives
t5: T5-XXL for the shared loops: states per prompt
t5_checkpoints: files of T5, umT5 and ByT5: dialects, dimensions
t5_network: the encoder networks of T5 and umT5
t5_tokenizer: T5's tokenizer, from wherever it may lie
tiles: overlapping pieces of clips and pictures, and joining them
token_rows: token ids, padded to one length and checked
"""
