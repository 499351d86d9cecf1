"""Decoding one token at a time: fixed shapes, nothing read back, so that a step can be a CUDA graph."""
