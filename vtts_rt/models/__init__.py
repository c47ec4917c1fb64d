"""Models in plain PyTorch: `forward(batch)` and no globals.

base.py says what a model is, a folder holds each family, registry.py lists and loads them.
vision.py and language.py are the tower and the decoder that they share, mrope.py gives positions,
tokenizer.py turns prompts into token ids.
"""
