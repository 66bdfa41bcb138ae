"""Tokenizer and model: loading, LoRA, quantization, precision, saving, merging, compilation."""
