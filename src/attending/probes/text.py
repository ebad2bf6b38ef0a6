"""Repetition and diversity of texts: rep-n, diversity, distinct-n, self-BLEU.

Texts are strings, which are split at white space as the papers' scripts do, or sequences of tokens
(lists of ids, tensors), which are taken as they are. Case and punctuation count. All scores are
shares between 0 and 1; papers print most of them times 100. What is undefined, such as a repetition
rate of texts too short for a single n-gram, is nan.

    diversity(texts)                   # 1: no n-gram comes twice; near 0: degenerate loops
    diversity(texts, compat="simctg")  # the number that papers print, to the digit

None of these says whether a text is any good: random words are diverse. Read them beside
`attending.probes.continuations.score_continuations`, or `attending.probes.mauve`.

Sources: rep-n and diversity as in contrastive search (Su et al. 2202.06417, package simctg),
distinct-n of Li et al. 1510.03055, self-BLEU of Zhu et al. 1802.01886 (Texygen), BLEU of Papineni
et al. 2002 with smoothing method 1 of Chen and Cherry 2014, as NLTK has it.
"""

import bisect
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

from torch import Tensor

Text = str | Iterable[Hashable] | Tensor
Compat = Literal["simctg"] | None
Aggregate = Literal["corpus", "text"]


def rep_n(
    texts: Iterable[Text], n: int, *, compat: Compat = None, aggregate: Aggregate = "corpus"
) -> float:
    """The share of n-grams that repeat an earlier one of the same text.

        rep_n = 1 - sum over texts of |distinct n-grams| / sum over texts of |n-grams|

    Args:
        texts: the texts, at least one.
        n: the length of the n-grams.
        compat: "simctg" does as that package (0.7) and so the papers that use it: the last n-gram
            of every text is left out, and the result is rounded to four decimals (two of a
            percentage). It matters for short texts.
        aggregate: "corpus" pools all texts, as above. "text" is the mean of the texts' own rates,
            which Welleck et al. 1908.04319 call seq-rep-n; texts without an n-gram are left out.

    Returns:
        The share; nan if no text has an n-gram.

    Raises:
        ValueError: for no texts, or an n below 1.
    """
    return _rep(_tokenized(texts), n, compat, aggregate)


def diversity(texts: Iterable[Text], *, compat: Compat = None) -> float:
    """The product of `1 - rep_n` for n = 2, 3, 4: 1 if nothing is repeated.

    Args:
        texts: the texts, at least one.
        compat: see `rep_n`.
    """
    tokens = _tokenized(texts)
    return math.prod(1 - _rep(tokens, n, compat, "corpus") for n in (2, 3, 4))


def distinct_n(texts: Iterable[Text], n: int) -> float:
    """The share of distinct n-grams among all n-grams of all texts together.

    Unlike in `rep_n`, an n-gram that two texts share counts once. It falls with the number of
    tokens, so compare equal numbers only.

    Returns:
        The share; nan if no text has an n-gram.

    Raises:
        ValueError: for no texts, or an n below 1.
    """
    _check_n(n)
    seen: set[tuple[Hashable, ...]] = set()
    total = 0
    for tokens in _tokenized(texts):
        grams = _ngrams(tokens, n)
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else math.nan


def self_bleu(texts: Iterable[Text], n: int = 4) -> float:
    """How well each text is covered by the others: mean BLEU-n; lower is more diverse.

    BLEU of a text, against all others as references:

        BLEU = min(1, exp(1 - r / c)) * (p_1 ... p_n) ** (1 / n)

    where c is its length, r the reference length nearest to it (the shorter of two), and p_k the
    share of its k-grams that are in a reference, each counted at most as often as in the reference
    that has most. A p_k of nothing counts as 0.1 of a k-gram (smoothing method 1), but BLEU is 0 if
    no single token is shared. A text never is its own reference, as in one path of Texygen.

    Texygen uses n = 3 and the first 500 texts. The time is linear in the number of tokens.

    Args:
        texts: the texts, at least two.
        n: the longest n-grams.

    Raises:
        ValueError: for fewer than two texts, or an n below 1.
    """
    _check_n(n)
    tokens = _tokenized(texts)
    if len(tokens) < 2:
        raise ValueError(
            f"texts: expected at least two, each a reference of the others, got 1: "
            f"{tokens[0][:8]!r}."
        )
    logs = [0.0] * len(tokens)  # of the product of precisions
    for k in range(1, n + 1):
        counts = [Counter(_ngrams(text, k)) for text in tokens]
        largest, second = _two_largest(counts)
        for index, own in enumerate(counts):
            matched = 0
            for gram, count in own.items():
                most, owner = largest[gram]
                matched += min(count, second[gram] if owner == index else most)
            if k == 1 and not matched:
                logs[index] = -math.inf
            logs[index] += math.log((matched or 0.1) / max(1, own.total()))
    lengths = sorted(len(text) for text in tokens)
    scores = [
        _brevity(len(text), lengths) * math.exp(log / n)
        for text, log in zip(tokens, logs, strict=True)
    ]
    return math.fsum(scores) / len(scores)


def _rep(tokens: list[Sequence[Hashable]], n: int, compat: Compat, aggregate: Aggregate) -> float:
    _check_n(n)
    if compat not in (None, "simctg"):
        raise ValueError(f"compat: expected None or 'simctg', got {compat!r}.")
    if aggregate not in ("corpus", "text"):
        raise ValueError(f"aggregate: expected 'corpus' or 'text', got {aggregate!r}.")
    counts = []
    for text in tokens:
        grams = _ngrams(text[:-1] if compat == "simctg" else text, n)
        counts.append((len(set(grams)), len(grams)))
    if aggregate == "text":
        rates = [1 - distinct / total for distinct, total in counts if total]
        found = math.fsum(rates) / len(rates) if rates else math.nan
    else:
        total = sum(total for _, total in counts)
        found = 1 - sum(distinct for distinct, _ in counts) / total if total else math.nan
    return round(100 * found, 2) / 100 if compat == "simctg" else found


def _two_largest(
    counts: list[Counter[tuple[Hashable, ...]]],
) -> tuple[dict[tuple[Hashable, ...], tuple[int, int]], Counter[tuple[Hashable, ...]]]:
    """For each n-gram its largest count, with the text that has it, and the next largest."""
    largest: dict[tuple[Hashable, ...], tuple[int, int]] = {}
    second: Counter[tuple[Hashable, ...]] = Counter()
    for index, own in enumerate(counts):
        for gram, count in own.items():
            most, _ = largest.get(gram, (0, -1))
            if count > most:
                second[gram] = most
                largest[gram] = count, index
            else:
                second[gram] = max(second[gram], count)
    return largest, second


def _brevity(length: int, lengths: list[int]) -> float:
    """The penalty for texts that are shorter than the nearest other length; `lengths` is sorted."""
    if not length:
        return 0.0
    at = bisect.bisect_left(lengths, length)
    others = lengths[max(0, at - 1) : at] + lengths[at + 1 : at + 2]  # at is a text of this length
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return min(1.0, math.exp(1 - nearest / length))


def _tokenized(texts: Iterable[Text]) -> list[Sequence[Hashable]]:
    if isinstance(texts, str):
        raise ValueError("texts: expected several, got one string. Put it into a list.")
    tokens: list[Sequence[Hashable]] = []
    for text in texts:
        if isinstance(text, str):
            tokens.append(text.split())
        elif not isinstance(text, Tensor):
            tokens.append(list(text))
        elif text.dim() == 1:
            tokens.append(text.tolist())
        else:
            raise ValueError(
                f"texts: expected one sequence of ids a text, got {list(text.shape)}. A batch "
                "[texts, tokens] is a list of texts already, padding included."
            )
    if not tokens:
        raise ValueError("texts: expected at least one, got none.")
    return tokens


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def _check_n(n: int) -> None:
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}.")
