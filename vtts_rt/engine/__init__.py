"""The engine: tokens and pixels in, tokens out, nothing computed twice."""
