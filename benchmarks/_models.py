"""The models of the benchmarks: their shapes and their operations per token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Shape of a decoder like Llama or Qwen3.

    Attributes:
        family: the `model_type`.
        width: of the hidden states; heads are `head_width` wide.
        inner: width of the feed-forward layers.
        tied: whether the output layer shares the embeddings' weights.
    """

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    family: str = "llama"
    head_width: int = 64
    tied: bool = False

    def config(self) -> Any:
        """Returns the config in transformers."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.family,
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_width,
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=2,  # <|im_end|> of the benchmarks' tokenizer
            pad_token_id=0,
        )

    def operations(self, frozen: bool) -> int:
        """Returns the operations of a forward and backward pass per token: 6 N, or 4 N where the weights are frozen.

        N counts the weights that each token is multiplied with, with the output layer, without embeddings. Each weight
        costs a multiplication and an addition for the output, as many for the gradient of the input, and as many for
        its own gradient, which frozen weights do not have. The matrix multiplications of attention, the adapters, and
        activations that checkpointing recomputes are not counted.
        """
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        multiplied = self.layers * (attention + 3 * self.width * self.inner) + self.width * self.vocabulary
        return (4 if frozen else 6) * multiplied


def square(layers: int, width: int, vocabulary: int, tied: bool = False) -> Shape:
    """Returns a small Llama with heads of 64 and a feed-forward layer of 2.75 times the width (Llama 2: 2.69)."""
    heads = width // 64
    inner = round(width * 2.75 / 64) * 64
    return Shape(layers, width, inner, heads, max(1, heads // 2), vocabulary, tied=tied)


QWEN = {"family": "qwen3", "head_width": 128, "vocabulary": 151_936}
GPU_SHAPES: dict[str, dict[str, Shape]] = {
    "real": {
        "0.6B": Shape(28, 1024, 3072, 16, 8, **QWEN, tied=True),  # type: ignore[arg-type]  # Qwen3-0.6B
        "1.7B": Shape(28, 2048, 6144, 16, 8, **QWEN, tied=True),  # type: ignore[arg-type]  # Qwen3-1.7B
        "8B": Shape(32, 4096, 14_336, 32, 8, 128_256, head_width=128),  # Llama 3.1 8B
    },
    # For trying the script out, with the vocabulary of the benchmarks' tokenizer: every path, no figure of interest.
    "tiny": {
        "0.6B": Shape(2, 64, 128, 4, 2, 32_000, family="qwen3", head_width=32, tied=True),
        "1.7B": Shape(2, 64, 128, 4, 2, 32_000, family="qwen3", head_width=32, tied=True),
        "8B": Shape(2, 64, 128, 2, 1, 32_000, head_width=32),
    },
}


def save_model(folder: Path, shape: Shape, tokenizer_folder: str, device: str = "cpu", dtype: str = "float32") -> None:
    """Writes a model folder for `model_name_or_path`: randomly initialized weights, and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(shape.config(), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
