"""Fused Triton kernels for Transformers, and their eager twins."""
