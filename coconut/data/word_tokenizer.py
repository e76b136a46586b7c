"""A word-level tokenizer that decodes to exactly the text that was encoded.

Tokens are words, runs of `#`, punctuation marks and line breaks. The default between two tokens is one space or
nothing. It depends on two sets of marks, found by majority in the training text: marks without a space before them,
and marks without one after them. Deviations are encoded explicitly: a joiner token for a missing space, and one token
per character of other white space. A vocabulary has these tokens only if its training text needs them; without them a
text is encoded as if it had the default spacing.

The joiner, and the provisional space that the decoder puts before each token, are private-use characters. Such a
character in a text is an unknown word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

SPECIAL = ("<pad>", "<eos>", "<unk>")
JOINER, SPACE, FOREIGN = "\ue000", "\ue001", "\ue002"

_WORDS = r"\n|\w+|#+|[^\w\s]"
_MARK = re.compile(r"(?<!#)#+|[^\w\s#]")


@dataclass(frozen=True)
class Spacing:
    """The default spacing between tokens, and the tokens for deviations from it.

    `before`, `after`: marks without a space before them, and after them. `joiner`: whether there is a joiner token.
    `spaces`: the white space characters (except line breaks) with tokens. `open_end`: a single space at the end of a
    text gets no token; used if steps end with a space, which the default spacing puts before the next segment anyway.
    """

    before: frozenset[str]
    after: frozenset[str]
    joiner: bool
    spaces: frozenset[str]
    open_end: bool

    @classmethod
    def of(cls, texts: Iterable[str], open_end: bool) -> Spacing:
        """The spacing that these texts have by majority."""
        spaced: dict[str, Counter[str]] = {"before": Counter(), "after": Counter()}
        kinds: set[str] = set()
        for text in texts:
            kinds.update(text)
            for found in _MARK.finditer(text):
                start, end = found.span()
                beside = {"before": text[max(start - 1, 0) : start], "after": text[end : end + 1]}
                for side, other in beside.items():
                    if other and other != "\n":
                        spaced[side][found[0][0]] += 1 if other.isspace() else -1
        closed = {side: frozenset(mark for mark, sum_ in counts.items() if sum_ < 0) for side, counts in spaced.items()}
        spaces = frozenset(kind for kind in kinds if kind.isspace() and kind != "\n")
        return cls(**closed, joiner=True, spaces=spaces, open_end=open_end)

    def backend(self, vocabulary: dict[str, int]) -> Any:
        """A `tokenizers.Tokenizer` with this vocabulary and spacing."""
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        before, after, spaces = (_character_class(marks) for marks in (self.before, self.after, self.spaces))
        opens, closes = (
            rf"[^\s{after}]",
            rf"[^\s{before}]",
        )  # by default with a space after, before
        foreign = normalizers.Replace(Regex(f"[{_character_class((JOINER, SPACE))}]"), FOREIGN)
        within = r"(?<=\w)(?=\w)|(?<=#)(?=#)"
        missing = normalizers.Replace(Regex(rf"(?!{within})(?<={opens})(?={closes})"), JOINER)
        end = r"|\z" if self.open_end else ""
        kept = rf"(?:(?<!{opens} )|(?!{closes}{end}))" if " " in self.spaces else ""
        written = rf"(?=[{spaces}])(?:[^ ]| {kept})|{_WORDS}" if self.spaces else _WORDS
        tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([foreign, missing] if self.joiner else [foreign])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(written), behavior="removed", invert=True)
        unspaced = rf"(?:{SPACE}{JOINER})+{SPACE}?|\A{SPACE}|(?<=[\s{after}]){SPACE}|{SPACE}(?=[\s{before}])"
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace(Regex(r"\A"), SPACE),
                decoders.Fuse(),
                decoders.Replace(Regex(unspaced), ""),
                decoders.Replace(SPACE, " "),
            ]
        )
        return tokenizer

    def counts(self, texts: Iterable[str]) -> Counter[str]:
        """The frequency of each token in the texts, joiner and white space included."""
        backend, found = self.backend({"<unk>": 0}), Counter[str]()
        for text in texts:
            normal = backend.normalizer.normalize_str(text)
            found.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
        del found[FOREIGN]
        return found


def word_level(segments: Sequence[Sequence[str]], open_end: bool) -> Any:
    """A word-level tokenizer for these texts, its words ordered by frequency.

    `segments`: for each example the question and then the texts of its chain, in order; each is encoded by itself.
    """
    whole = [text for question, *chain in segments for text in (question, "".join(chain))]
    spacing = Spacing.of(whole, open_end)
    following = {text[:1] for _, _, *later in segments for text in later}
    if any(first.isspace() or first in spacing.before for first in following):
        spacing = replace(spacing, open_end=False)
    counts = spacing.counts(text for texts in segments for text in texts)
    words = [*SPECIAL, *(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])))]
    needed = replace(spacing, joiner=JOINER in counts, spaces=spacing.spaces.intersection(counts))
    return needed.backend({word: number for number, word in enumerate(words)})


def _character_class(characters: Iterable[str]) -> str:
    """The characters escaped for use in a character class of a regular expression."""
    return "".join(rf"\x{{{ord(character):x}}}" for character in sorted(characters))
