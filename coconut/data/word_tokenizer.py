"""A word-level tokenizer whose decoding gives back the text that was encoded.

Tokens are words, runs of `#`, single marks and ends of lines. Between two of them stands one space or nothing by
default, which depends on two sets of marks, learned by majority: those without a space before them, and those without
one after them. What deviates from the default is written out: a joiner where a space is missing, and other whitespace
as tokens of its own, a character each. A vocabulary has them if its training text needs them; otherwise a text is read
as if it were spaced by default.

The joiner, and the space that the decoder puts before each token until it knows the next one, are private-use
characters. In a text such a character is an unknown word.
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
    """The default between two tokens, and what can be written besides it.

    `before`, `after`: marks without a space before them, and after them. `joiner`: whether there is a joiner. `spaces`:
    the whitespace, of one line, that has tokens. `open_end`: a single space at the end of a text is left to what
    follows, since a step ends with it, and what follows a step has a space before it by default.
    """

    before: frozenset[str]
    after: frozenset[str]
    joiner: bool
    spaces: frozenset[str]
    open_end: bool

    @classmethod
    def of(cls, texts: Iterable[str], open_end: bool) -> Spacing:
        """What these texts have by majority."""
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
        """The tokenizer of these words."""
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        before, after, spaces = (_character_class(marks) for marks in (self.before, self.after, self.spaces))
        opens, closes = rf"[^\s{after}]", rf"[^\s{before}]"  # that have a space after them, and before them
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
        """How often each token stands in the texts, joiner and whitespace among them."""
        backend, found = self.backend({"<unk>": 0}), Counter[str]()
        for text in texts:
            normal = backend.normalizer.normalize_str(text)
            found.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
        del found[FOREIGN]
        return found


def word_level(segments: Sequence[Sequence[str]], open_end: bool) -> Any:
    """The tokenizer of these texts, its words in the order of their frequency.

    `segments`: of each example the question, and the texts that follow each other after it, each encoded by itself.
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
    """For a class of characters in a regular expression."""
    return "".join(rf"\x{{{ord(character):x}}}" for character in sorted(characters))
