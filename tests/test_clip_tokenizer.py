from __future__ import annotations

import random

import peers
import pytest
import torch

from clip_index.clip.tokenizer import Tokenizer, clean, tokenize
from clip_index.types import UsageError

WORDS = (
    "a photo of the dog cat's isn't they'll I'd WE'RE 3.14 1984 ½ ² Ⅷ ٣ naïve café İstanbul \u017f'\u017f '\u017f "
    "犬の写真 猫 хорошая собака שלום مرحبا हिन्दी 🐶 👩‍👩‍👧 🇫🇷 ❤️ &amp; &amp;amp; &lt;b&gt; &eacute; &#128054; & "
    "ﬁne <br> <start_of_text> <end_of_text> <|endoftext|> https://example.org/a?b=c&d=e snake_case __init__ #tag @who "
    "... -- (x) Ã©tÃ© â€œquotedâ€\x9d schÃ¶n \x00 \x1b[31m \x7f \u200b \u00a0 \ufeff \ud83d K Ω ǅ ͅ a\u0301"
).split(" ")


def random_text(generator: random.Random) -> str:
    kind = generator.random()
    if kind < 0.05:
        return generator.choice(["", " ", "\n\t", "\x00", "&", "&amp", "'", "\u200b"])
    if kind < 0.15:
        return "".join(chr(generator.randrange(0x20, 0x250)) for _ in range(generator.randrange(1, 40)))
    if kind < 0.25:
        pool = [(0x20, 0xD7FF), (0xE000, 0xFFFF), (0x1F300, 0x1FAFF)]
        return "".join(chr(generator.randrange(*generator.choice(pool))) for _ in range(generator.randrange(1, 30)))
    if kind < 0.3:
        return generator.choice(["ab", "word ", "!?", "é", "犬", "🐶"]) * generator.randrange(60, 300)
    separator = generator.choice([" ", "  ", "", "\n", "\u3000"])
    return separator.join(generator.choice(WORDS) for _ in range(generator.randrange(1, 25)))


def test_ten_thousand_texts_have_open_clips_tokens():
    generator = random.Random(0)
    texts = [*WORDS, *(random_text(generator) for _ in range(10_000))]
    expected = peers.open_clip().tokenize(texts)
    found = tokenize(texts, truncate=True)
    different = [text for text, same in zip(texts, (found == expected).all(dim=1), strict=True) if not same]
    assert different == []


def test_known_ids():
    tokens = tokenize(["a diagram", "a dog"])
    assert tokens.dtype == torch.long and tokens.shape == (2, 77)
    assert tokens[0, :5].tolist() == [49406, 320, 22697, 49407, 0]
    assert tokens[1, :5].tolist() == [49406, 320, 1929, 49407, 0]


def test_one_text_and_no_text():
    assert tokenize("a dog").equal(tokenize(["a dog"]))
    assert tokenize([]).shape == (0, 77)
    assert tokenize("")[0, :3].tolist() == [49406, 49407, 0]


def test_a_long_text_is_refused_or_cut():
    words = "dog " * 100
    with pytest.raises(UsageError, match=r"'dog dog.*more than 77 tokens: pass truncate=True"):
        tokenize(["short", words])
    cut = tokenize(words, truncate=True)
    assert cut[0].tolist() == [49406, *[1929] * 75, 49407]
    assert tokenize("dog " * 75)[0].equal(cut[0])
    assert tokenize(words, context_length=248)[0, 100:103].tolist() == [1929, 49407, 0]


def test_other_types_are_refused_by_position():
    with pytest.raises(UsageError, match="number 1 is bytes"):
        tokenize(["a", b"b"])
    with pytest.raises(UsageError, match="context_length must be at least 2"):
        tokenize("a", context_length=1)


def test_a_limit_is_kept_without_reading_on():
    tokenizer = Tokenizer()
    assert tokenizer.encode("dog cat dog cat", limit=2) == tokenizer.encode("dog cat")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A  Dog\n", "a dog"),
        ("Tom &amp;amp; Jerry", "tom & jerry"),
        ("cafÃ©", "café"),
        ("caf&eacute;", "café"),
        ("ﬁne", "fine"),
        ("“quoted”", '"quoted"'),
    ],
)
def test_cleaning(text, expected):
    assert clean(text) == expected
