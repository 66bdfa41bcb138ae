"""Where a prompt meets its answer: would one pass over both have cut other tokens than the two have apart?

A server encodes the prompt alone and the model goes on from there, so the two are encoded apart here too, always. A
tokenizer's merge over that seam then moves nothing; it is only counted, for whoever compares with a trainer that
encodes conversations in one pass.
"""

from __future__ import annotations

from functools import cached_property

from tokenizers import Tokenizer, pre_tokenizers

_TAIL = 32  # characters of the prompt that are looked at: its last words and the header behind them
_HEAD = 32  # of the answer


class SeamMerges:
    """Tells which seams one pass would have crossed. Nearly all are told by the two characters that meet there.

    Args:
        backend: of the tokenizer.
        greedy: the added tokens that take the blanks behind them (`rstrip`).
    """

    def __init__(self, backend: Tokenizer, greedy: tuple[str, ...] = ()) -> None:
        self._backend, self._greedy = backend, greedy
        self._joinable: dict[tuple[str, str], bool] = {}
        self._regrouped: dict[tuple[str, str], bool] = {}

    def crosses(self, prompt: str, answer: str) -> bool:
        """Whether the tokens at the prompt's end are others when the answer follows."""
        if self._greedy and answer[:1].isspace() and prompt.rstrip().endswith(self._greedy):
            return True
        pair = (prompt[-1:], answer[:1])
        joinable = self._joinable.get(pair)
        if joinable is None:
            joinable = self._joinable[pair] = self._can_join(*pair)
        if joinable:
            return self._changes(prompt[-_TAIL:], answer[:_HEAD])
        # How blanks at the prompt's end are grouped may hang on the next character: by the pattern `\s+(?!\S)` of
        # GPT-2 and its kin, two line feeds are one token at the end of a text and two in front of a word.
        if not prompt[-2:].isspace():
            return False
        key = (prompt[-_TAIL:], answer[:1])
        if key not in self._regrouped:
            if len(self._regrouped) > 10_000:
                self._regrouped.clear()
            self._regrouped[key] = self._changes(*key)
        return self._regrouped[key]

    def _changes(self, tail: str, head: str) -> bool:
        alone = self._backend.encode(tail, add_special_tokens=False).ids
        return self._backend.encode(tail + head, add_special_tokens=False).ids[: len(alone)] != alone

    def _can_join(self, before: str, after: str) -> bool:
        """Whether any token of the vocabulary holds `before` with `after` behind it."""
        if not before or not after:
            return False
        if self._backend.normalizer is not None and not (before + after).isascii():
            return True  # normalizing may put other characters there
        return self._spelled(before)[-1] + self._spelled(after)[0] in self._vocabulary

    @cached_property
    def _vocabulary(self) -> str:
        return "\0".join(self._backend.get_vocab(with_added_tokens=False))

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ĠĠ" in self._vocabulary or "Ġ" in self._backend.get_vocab(with_added_tokens=False)

    def _spelled(self, character: str) -> str:
        """A character as the vocabulary writes it."""
        if not self._is_byte_level:
            return character.replace(" ", "▁")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return byte_level.pre_tokenize_str(character)[0][0]
