"""Models in plain torch modules: they know nothing of how they are trained in parallel."""

from paracomm.models.gpt import GPT, GPTConfig, next_byte_loss

__all__ = ["GPT", "GPTConfig", "next_byte_loss"]
