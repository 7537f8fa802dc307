"""What a prompt changes of a clip's caption: one thing, which the motion outlives, or several."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence

# words that follow from others ("in the water", "on the grass"): no change of their own, but they part two
_LINKING = frozenset(
    [
        "a", "an", "the", "is", "are", "was", "were", "and", "of", "in", "on", "at", "to", "with", "from", "by", "into",
    ]
)  # fmt: skip


def changes(caption: str, prompt: str) -> list[tuple[str, str]]:
    """List what a prompt says otherwise than a caption: pairs of the words that were, and that are in their place.

    Words in a row are one change; articles, prepositions and the like part changes and are none. One of the two is
    empty where words were added or left out.
    """
    before, after = (re.findall(r"[^\W_]+", text.lower()) for text in (caption, prompt))
    matcher = difflib.SequenceMatcher(a=before, b=after, autojunk=False)
    found: list[tuple[str, str]] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            continue
        was, now = _runs(before[a:b]), _runs(after[c:d])
        found += zip(was, now, strict=True) if len(was) == len(now) else [(" ".join(was), " ".join(now))]
    return found


def _runs(words: Sequence[str]) -> list[str]:
    """Join words in a row that mean something."""
    parted = itertools.groupby(words, key=lambda word: word not in _LINKING)
    return [" ".join(run) for means, run in parted if means]
