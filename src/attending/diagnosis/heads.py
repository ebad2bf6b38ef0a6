"""Statistics of the heads of one attention module, summed up over calls and sequences."""

from collections import defaultdict
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.core import statistics
from attending.core.statistics._call import Call, prepare
from attending.core.statistics.columns import visible_queries
from attending.diagnosis.problems import Problem
from attending.diagnosis.record import STATISTICS, LayerRecord, TopKey
from attending.diagnosis.tokens import TokenReader, class_indices

TOP_KEYS = 8  # that are reported of a head
CANDIDATES = 64  # that are kept until then
SAMPLES = 512  # tokens whose head outputs are compared
OLD_ENOUGH = 4  # a key is judged once a quarter of the queries see it
NOTABLE = 0.05  # mean importance from which on a strong key is reported

Heads = Float[Tensor, " heads"]


class HeadStatistics:
    """What is known of the heads of one module so far.

    Args:
        name: of the module.
        layer: its number.
        kind: what it attends to.
        wanted: the statistics to compute.
        map_size: buckets per side of the pooled map.
        reader: names tokens and their classes.
    """

    def __init__(
        self,
        name: str,
        layer: int | None,
        kind: Literal["self", "cross"],
        wanted: frozenset[str],
        map_size: int,
        reader: TokenReader,
    ) -> None:
        self.name, self.layer, self.kind = name, layer, kind
        self.wanted, self.map_size, self.reader = wanted, map_size, reader
        self.is_causal = True
        self.head_dim = 0
        self.longest = 0  # keys of the longest sequence
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = defaultdict(float)
        self._class_names: list[str] = []
        self._class_mass: list[Tensor] = []  # a tensor [heads] for each class
        self._class_rows = 0.0
        self._top: list[Tensor] = []  # importance, token, position, sequence: each [heads, some]
        self._strong: dict[tuple[int, int], list[float]] = {}
        self._sequences = 0
        self._samples: Tensor | None = None
        self.similarity: Tensor | None = None

    def add(
        self, problem: Problem, ids: Int[Tensor, "batch keys"] | None, first_sequence: int
    ) -> None:
        """Take in the attention of some sequences.

        Args:
            problem: their queries and keys.
            ids: the tokens of the keys, if they are tokens.
            first_sequence: the number of the batch's first sequence among all sequences.
        """
        query, key, arguments = problem.query, problem.key, problem.arguments
        self.head_dim = query.shape[-1]
        self.is_causal &= arguments["is_causal"]
        self.longest = max(self.longest, key.shape[2])
        summary = statistics.map_summary(
            query,
            key,
            size=self._map_size(query.shape[2], key.shape[2]),
            with_max_probability="max_probability" in self.wanted,
            with_participation_ratio="effective_keys" in self.wanted,
            **arguments,
        )
        call = prepare(query, key, **arguments)
        self._rows(summary, call.visible_keys())
        self._columns(problem, summary.mass)
        if summary.pooled is not None:
            self._mean("pooled", summary.pooled.sum(0), query.shape[0])
        judged = key_importance(call, summary.mass)
        self._mean("sink", judged.amax(-1).sum(0), query.shape[0])
        self._note_strongest(judged.detach().cpu(), ids, problem, first_sequence)
        if ids is not None and self.reader.has_classes:
            self._add_classes(summary.mass.detach().double().cpu(), ids)
            self._class_rows += query.shape[0] * query.shape[2]
        self._sequences += query.shape[0]

    def add_outputs(self, output: Float[Tensor, "batch heads queries dim"]) -> None:
        """Take in the outputs of the heads, without padding, until there are enough samples."""
        if self.similarity is not None or "similarity" not in self.wanted or output.shape[1] < 2:
            return
        samples = output.transpose(0, 1).flatten(1, 2)
        enough = max(SAMPLES, 2 * samples.shape[2])
        every = max(1, samples.shape[1] // enough)
        samples = samples[:, ::every][:, :enough].float()
        if self._samples is not None:
            samples = torch.cat([self._samples, samples], 1)[:, :enough]
        self._samples = samples
        if samples.shape[1] == enough:
            self._compare()

    def record(self) -> LayerRecord:
        """The statistics as plain numbers."""
        if self.similarity is None and self._samples is not None:
            self._compare()
        means = {
            name: (self._sums[name] / self._weights[name]).tolist()
            for name in self._sums
            if name != "pooled"
        }
        found = {name: means[name] for name in STATISTICS if name in self.wanted & means.keys()}
        similarity: list[list[float]] = []
        if self.similarity is not None:
            similarity = self.similarity.tolist()
            others = self.similarity.clone().fill_diagonal_(0.0)
            found["similarity"] = others.amax(1).tolist()
        pooled = self._sums.get("pooled")
        if pooled is not None:
            pooled = pooled / self._weights["pooled"]
            found |= _structure(pooled, self.is_causal, self.wanted)
        return LayerRecord(
            name=self.name,
            layer=self.layer,
            kind=self.kind,
            is_causal=self.is_causal,
            head_dim=self.head_dim,
            statistics=found,
            class_mass={
                name: (mass / self._class_rows).tolist()
                for name, mass in zip(self._class_names, self._class_mass, strict=True)
            },
            top_keys=self._strongest(),
            pooled=[] if pooled is None else pooled.tolist(),
            similarity=similarity,
            strong_keys=self._strong_keys(),
            longest=self.longest,
        )

    def _mean(self, name: str, total: Tensor, weight: Tensor | float) -> None:
        """Add to a mean over rows or sequences; the weight is the same for all heads."""
        if isinstance(weight, Tensor):
            weight = float(weight.max())
        total = total.detach().double().cpu()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._weights[name] += weight

    def _map_size(self, queries: int, keys: int) -> int | None:
        """Buckets per side, the same for all sequences; None if that would leave holes."""
        known = self._sums.get("pooled")
        size = min(self.map_size, max(queries, keys)) if known is None else known.shape[-1]
        return size if min(queries, keys) >= size else None

    def _rows(self, summary: statistics.MapSummary, visible: Tensor) -> None:
        batch, queries = summary.lse.shape[0], summary.lse.shape[2]
        self._mean("entropy", summary.entropy.sum((0, 2)), batch * queries)
        if summary.participation_ratio is not None:
            self._mean("effective_keys", summary.participation_ratio.sum((0, 2)), batch * queries)
        if summary.max_probability is not None:
            self._mean("max_probability", summary.max_probability.sum((0, 2)), batch * queries)
        if "normalized_entropy" in self.wanted:
            visible = visible.expand(summary.entropy.shape)
            share = share_of_entropy(summary.entropy, visible)
            self._mean("normalized_entropy", share.sum((0, 2)), (visible > 1).sum((0, 2)))

    def _columns(self, problem: Problem, mass: Float[Tensor, "batch heads keys"]) -> None:
        query, key, arguments = problem.query, problem.key, problem.arguments
        batch, queries = query.shape[0], query.shape[2]
        self._mean("first_token", mass[..., 0].sum(0), batch * queries)
        if self.kind == "self" and "mean_distance" in self.wanted:
            if arguments["is_causal"] and queries == key.shape[2]:
                # The mean distance is the mean position less the mean position that is looked at.
                position = torch.arange(queries, device=mass.device, dtype=mass.dtype)
                distance = batch * position.sum() - (mass * position).sum((0, 2))
            else:
                distance = statistics.mean_distance(query, key, **arguments).sum((0, 2))
            self._mean("mean_distance", distance.clamp_min(0.0), batch * queries)

    def _add_classes(self, mass: Tensor, ids: Tensor) -> None:
        classes = class_indices(self.reader, ids, self._class_names)
        while len(self._class_mass) < len(self._class_names):
            self._class_mass.append(torch.zeros(mass.shape[1], dtype=torch.float64))
        for index in classes.unique().tolist():
            self._class_mass[index] += (mass * (classes == index)[:, None]).sum((0, 2))

    def _note_strongest(
        self, importance: Tensor, ids: Tensor | None, problem: Problem, first_sequence: int
    ) -> None:
        batch, heads, keys = importance.shape
        top = importance.topk(min(TOP_KEYS, keys), -1)
        tokens = torch.full((batch, keys), -1) if ids is None else ids
        token = tokens[:, None].expand(-1, heads, -1).gather(2, top.indices)
        sequence = (problem.sequences.cpu() + first_sequence)[:, None, None].expand_as(token)
        fresh = [
            part.transpose(0, 1).flatten(1) for part in (top.values, token, top.indices, sequence)
        ]
        if self._top:
            fresh = [torch.cat(pair, 1) for pair in zip(self._top, fresh, strict=True)]
        order = fresh[0].argsort(1, descending=True)[:, :CANDIDATES]
        self._top = [part.gather(1, order) for part in fresh]
        firsts = (part[..., 0].tolist() for part in (top.values, token, top.indices))
        for values in zip(*firsts, strict=True):
            for head, (value, name, place) in enumerate(zip(*values, strict=True)):
                # Told apart by the token; by the place too where it is the first, or all there is.
                what = (name, place if name < 0 or place == 0 else -1)
                self._strong.setdefault(what, [0.0] * heads)[head] += value

    def _strongest(self) -> list[list[TopKey]]:
        if not self._top:
            return []
        found = []
        for values in zip(*(part.tolist() for part in self._top), strict=True):
            keys: dict[tuple[int, int], TopKey] = {}
            for importance, token, position, sequence in zip(*values, strict=True):
                if (token, position) not in keys and importance > 0:
                    text = self._text(token, position)
                    keys[token, position] = TopKey(text, position, sequence, importance)
            found.append(list(keys.values())[:TOP_KEYS])
        return found

    def _strong_keys(self) -> dict[str, list[float]]:
        strong = {}
        for (token, position), strength in self._strong.items():
            mean = [value / self._sequences for value in strength]
            if max(mean) >= NOTABLE:
                text = self._text(token, position)
                strong[f"{text} (first)" if position == 0 and token >= 0 else text] = mean
        return strong

    def _text(self, token: int, position: int) -> str:
        return f"position {position}" if token < 0 else self.reader.text(token)

    def _compare(self) -> None:
        assert self._samples is not None
        # Of few samples, the outputs of all heads look alike.
        if self._samples.shape[1] >= 2 * self._samples.shape[2]:
            self.similarity = statistics.head_similarity(self._samples).cpu()
        self._samples = None


def key_importance(
    call: Call, mass: Float[Tensor, "batch heads keys"]
) -> Float[Tensor, "batch heads keys"]:
    """The mean attention of the queries that see a key; 0 for keys that too few see to judge."""
    count = visible_queries(call)
    enough = count >= max(1.0, call.query.shape[2] / OLD_ENOUGH)
    return (mass / count.clamp_min(1.0)).where(enough, 0.0)


def share_of_entropy(
    entropy: Float[Tensor, "batch heads queries"], visible: Float[Tensor, "batch heads queries"]
) -> Float[Tensor, "batch heads queries"]:
    """Entropies over their largest value, the log of the visible keys; 0 where that is 0."""
    return torch.where(visible > 1, entropy / visible.clamp_min(2).log(), 0.0)


def _structure(
    pooled: Float[Tensor, "heads size size"], is_causal: bool, wanted: frozenset[str]
) -> dict[str, list[float]]:
    """What a pooled map tells: mass near the diagonal, and the share of buckets that is needed."""
    size = pooled.shape[-1]
    place = torch.arange(size)
    distance = (place[:, None] - place).abs()
    rows = (pooled.sum(-1) > 0).sum(-1).clamp_min(1)
    found = {}
    if "local_mass" in wanted:
        found["local_mass"] = ((pooled * (distance <= 1)).sum((1, 2)) / rows).tolist()
    if "block_density" in wanted:
        visible = (place[:, None] >= place) if is_causal else torch.ones(size, size).bool()
        sorted_mass = pooled.flatten(1).sort(-1, descending=True).values.cumsum(-1)
        needed = (sorted_mass < 0.95 * sorted_mass[:, -1:]).sum(-1) + 1
        found["block_density"] = (needed / visible.sum()).clamp_max(1.0).tolist()
    return found
