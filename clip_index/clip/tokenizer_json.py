"""The tokenizer as a file for other programs."""

from __future__ import annotations

import gzip
from importlib.resources import files

from clip_index.clip.tokenizer import END, START

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def tokenizer_json(context_length: int, whole: bool) -> str:
    """`tokenizer.json` of the library tokenizers; `whole` pads every text to `context_length`, else to the longest.

    Broken Unicode and HTML escapes are not mended by it.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    data = (files("clip_index") / "data" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [*map(chr, printable), *(chr(256 + n) for n in range(256 - len(printable)))]
    merges = [tuple(line.split()) for line in gzip.decompress(data).decode().split("\n")[1 : START - 512 + 1]]
    symbols = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges)]
    start, end = ("<|startoftext|>", START), ("<|endoftext|>", END)
    vocabulary = {symbol: n for n, symbol in enumerate([*symbols, start[0], end[0]])}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=end[0], end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A {end[0]}", special_tokens=[start, end])
    made.enable_truncation(context_length)
    made.enable_padding(pad_id=0, pad_token=symbols[0], length=context_length if whole else None)
    return made.to_str()
