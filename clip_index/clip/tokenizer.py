"""OpenAI's byte-pair encoding of texts.

The steps: mend broken Unicode and undo HTML escapes -> collapse white space, lower-case -> split into words -> bytes of
each word -> merge the pair that was learnt first, until none is left -> ids between a start and an end token.
"""

from __future__ import annotations

import gzip
import html
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from heapq import heapify, heappop, heappush
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from clip_index.types import UsageError

if TYPE_CHECKING:
    from torch import Tensor

START, END = 49406, 49407
CONTEXT_LENGTH = 77
_MERGES = 49152 - 256 - 2
_PLAIN = re.compile(r"[\t\n\r -%'-~]*")
_LONGEST_CACHED_WORD = 64


class Tokenizer:
    """Texts to token ids. Words are remembered, so that a caption costs a few microseconds."""

    def __init__(self) -> None:
        import regex

        data = (files("clip_index") / "data" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
        lines = gzip.decompress(data).decode().split("\n")[1 : 1 + _MERGES]
        # The vocabulary spells bytes that do not print as the characters from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        order = printable + [byte for byte in range(256) if byte not in printable]
        characters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
        self._byte_ids = [order.index(byte) for byte in range(256)]
        ids = {symbol: n for n, symbol in enumerate(characters + [f"{character}</w>" for character in characters])}
        self._merges: dict[tuple[int, int], int] = {}
        for line in lines:
            left, right = line.split()
            # Ids grow in the order in which merges were learnt: the smallest id is the merge to do first.
            self._merges[ids[left], ids[right]] = ids[left + right] = len(ids)
        self._special = {"<start_of_text>": (START,), "<end_of_text>": (END,)}
        self._words = regex.compile(
            r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )
        self._remember = lru_cache(maxsize=1 << 17)(self._merge)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """The ids of a text without start and end; the first `limit` of them, or a few more."""
        ids: list[int] = []
        for word in self._words.finditer(clean(text)):
            word = word[0]
            ids += self._remember(word) if len(word) <= _LONGEST_CACHED_WORD else self._merge(word)
            if limit is not None and len(ids) >= limit:
                break
        return ids

    def _merge(self, word: str) -> tuple[int, ...]:
        if word in self._special:
            return self._special[word]
        symbols = [self._byte_ids[byte] for byte in word.encode()]
        symbols[-1] += 256
        # Neighbours are linked, so that a word costs n log n: a caption can be one word of a megabyte.
        merges, end = self._merges, len(symbols)
        left, right = list(range(-1, end - 1)), list(range(1, end + 1))
        heap = [(merges[pair], n) for n, pair in enumerate(pairwise(symbols)) if pair in merges]
        heapify(heap)
        while heap:
            merged, here = heappop(heap)
            there = right[here]
            if there == end or merges.get((symbols[here], symbols[there])) != merged:
                continue
            after = right[here] = right[there]
            symbols[here], symbols[there] = merged, -1
            if after < end:
                left[after] = here
            for n, m in ((left[here], here), (here, after)):
                pair = (symbols[n], symbols[m]) if n >= 0 and m < end else None
                if pair in merges:
                    heappush(heap, (merges[pair], n))
        return tuple(symbol for symbol in symbols if symbol >= 0)


def clean(text: str) -> str:
    """The text mended, unescaped, with single spaces, in lower case."""
    # Printable ASCII without an ampersand has nothing to mend, which is most captions.
    if not _PLAIN.fullmatch(text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@cache
def default_tokenizer() -> Tokenizer:
    """The tokenizer, read once in a process."""
    return Tokenizer()


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False) -> Tensor:
    """Token ids, LongTensor [n, context_length], of one text or a list: start, ids, end, then zeros.

    A text that does not fit is cut, with its end token kept, if `truncate`; else UsageError says which one.
    """
    import torch

    tokenizer = default_tokenizer()
    texts = [texts] if isinstance(texts, str) else texts
    if context_length < 2:
        raise UsageError(f"context_length must be at least 2, not {context_length}")
    tokens = np.zeros((len(texts), context_length), np.int64)
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(f"texts must be str, or a list of str; number {n} is {type(text).__name__}")
        ids = tokenizer.encode(text, limit=context_length - 1)
        if len(ids) > context_length - 2:
            if not truncate:
                shown = text if len(text) < 60 else f"{text[:57]}..."
                raise UsageError(f"{shown!r} takes more than {context_length} tokens: pass truncate=True to cut it")
            ids = ids[: context_length - 2]
        tokens[n, : len(ids) + 2] = START, *ids, END
    return torch.from_numpy(tokens)
