"""The Qwen2.5-VL family in plain PyTorch: `forward(batch)` and no globals.

vision.py and language.py are the two towers, qwen2_5_vl.py joins and loads them, mrope.py gives
positions, tokenizer.py turns prompts into token ids.
"""
