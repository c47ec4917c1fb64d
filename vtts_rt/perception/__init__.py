"""Clues, regions, frame policies and prompt layouts: pure Python, no I/O, no tokenizer."""
