"""From scratch on nested data: documents whose meaning is made in sentences.

Each of the five sentences has four words in any order: a subject of two kinds, a verb of two kinds,
and two words of noise. It is for or against by the parity of subject and verb, so that no word says
anything by itself; the label of a document is what most of its sentences are. So a reader has to
bind two words within a sentence before anything can be counted. The models differ in the tree of
their attention and in nothing else, weights included; all are told the sentence of each word and
its place in it. The task was chosen after two others in which counting words goes a long way
(sentences of many words for one side or the other), where the tree made no difference beyond noise
in one seed.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attending.nn.hierarchical_attention import hierarchical_attention
from attending.nn.partition_tree import PartitionTree

SENTENCES, WORDS, NOISE = 5, 4, 6
TOKENS = SENTENCES * WORDS
VOCABULARY = 4 + NOISE


def documents(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`[count, 20]` tokens and their labels, 0 or 1."""
    subject = torch.randint(0, 2, (count, SENTENCES), generator=generator)
    verb = torch.randint(0, 2, (count, SENTENCES), generator=generator)
    noise = torch.randint(4, VOCABULARY, (count, SENTENCES, WORDS - 2), generator=generator)
    words = torch.cat([subject[..., None], 2 + verb[..., None], noise], -1)
    order = torch.rand(count, SENTENCES, WORDS, generator=generator).argsort(-1)
    label = ((subject ^ verb).sum(1) > SENTENCES // 2).long()
    return words.gather(-1, order).flatten(1), label


def tree_of(kind: str, generator: torch.Generator) -> PartitionTree:
    """The tree of a variant: "softmax" (flat), "sentences", or "shuffled" groups of four."""
    if kind == "softmax":
        return PartitionTree.windows(TOKENS, ())
    if kind == "sentences":
        return PartitionTree.windows(TOKENS, (WORDS,))
    if kind == "shuffled":
        groups = torch.arange(TOKENS) // WORDS
        return PartitionTree.from_labels(groups[torch.randperm(TOKENS, generator=generator)])
    raise ValueError(f"kind: expected softmax, sentences or shuffled, got {kind!r}.")


class Encoder(nn.Module):
    """A pre-norm encoder with attention along a tree; the mean of its tokens is classified."""

    def __init__(self, dim: int, heads: int, layers: int, tree: PartitionTree) -> None:
        super().__init__()
        self.tree, self.heads = tree, heads
        self.words, self.places = nn.Embedding(VOCABULARY, dim), nn.Embedding(WORDS, dim)
        self.sentences = nn.Embedding(SENTENCES, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers))
        self.projects = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(layers))
        self.merges = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 2)

    def forward(self, words: Tensor) -> Tensor:
        """Logits of the two labels."""
        place = torch.arange(TOKENS)
        hidden = self.words(words) + self.places(place % WORDS) + self.sentences(place // WORDS)
        layers = zip(
            self.norms[::2], self.projects, self.merges, self.norms[1::2], self.mlps, strict=True
        )
        for norm, project, merge, mlp_norm, mlp in layers:
            parts = project(norm(hidden)).unflatten(-1, (3, self.heads, -1))
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            taken = hierarchical_attention(query, key, value, tree=self.tree)
            hidden = hidden + merge(taken.transpose(1, 2).flatten(2))
            hidden = hidden + mlp(mlp_norm(hidden))
        logits: Tensor = self.head(self.norm(hidden.mean(1)))
        return logits


def train(
    kind: str,
    seed: int,
    documents_seen: int,
    *,
    dim: int,
    heads: int,
    layers: int,
    batch: int,
    steps: int,
    learning_rate: float,
    test_documents: int,
) -> float:
    """Train one model; its accuracy on new documents."""
    data = torch.Generator().manual_seed(seed)
    words, labels = documents(documents_seen, data)
    test_words, test_labels = documents(test_documents, torch.Generator().manual_seed(seed + 1000))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Encoder(dim, heads, layers, tree_of(kind, torch.Generator().manual_seed(seed)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
        warmup = max(steps // 10, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / steps * 1.1, 1.0)
        )
        for _ in range(steps):
            pick = torch.randint(documents_seen, (batch,), generator=data)
            loss = cross_entropy(model(words[pick]), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return float((model(test_words).argmax(-1) == test_labels).float().mean())
