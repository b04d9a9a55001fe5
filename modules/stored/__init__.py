"""Linear layers whose weights are stored in 8 or 4 bits.

forms: what every form of a stored weight can be asked; layers that compute with one
fp8, fp8_products: floats of 8 bits; products of a frozen fp8 weight, with gradient
int8: int8 with a scale for each row, rotated (ConvRot)
nf4: bitsandbytes' 4 bits
ggml: values of the kinds of GGUF files
packed: forms of other programs that are only read: mxfp8, nvfp4, int4
"""
