"""Models in plain torch modules: they know nothing of how they are trained in parallel."""

from paracomm.models.decoder import Decoder
from paracomm.models.generation import generate
from paracomm.models.gpt import GPT, GPTConfig, next_byte_loss
from paracomm.models.layers import DecoderConfig
from paracomm.models.seq2seq import Seq2Seq, Seq2SeqConfig

__all__ = [
    "GPT",
    "Decoder",
    "DecoderConfig",
    "GPTConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "generate",
    "next_byte_loss",
]
