"""Rows of labelled questions, and needle: generated clips with answers."""
