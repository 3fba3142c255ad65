"""Language modelling: small decoder-only transformers, and text as bytes or tokens."""

from recipes.llm.data import TextFolder
from recipes.llm.llama import Llama
from recipes.llm.model import ByteGPT
from recipes.llm.tokens import TokenFiles

__all__ = ["ByteGPT", "Llama", "TextFolder", "TokenFiles"]
