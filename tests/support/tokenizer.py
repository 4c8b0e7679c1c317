"""A tokenizer for the tiny models: words w0, w1, ... are their own numbers."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from support.models import VOCABULARY


def tokenizer() -> PreTrainedTokenizerFast:
    first = VOCABULARY - 3
    words = {f"w{index}": index for index in range(first)} | {"<pad>": first, "<eos>": first + 1, "<unk>": first + 2}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106  # a word of the vocabulary
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")  # noqa: S106
