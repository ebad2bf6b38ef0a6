"""Without training: MiniLM reads docstrings while some of its layers are tied along sentences.

Docstrings of at least three sentences from five packages of Python's standard library; the task is
to say which package one is from. The centroids of the packages are made with the model as it is;
then new docstrings are embedded with hierarchical attention in some layers and go to the nearest
centroid. The mean cosine to the embeddings of the untouched model shows what accuracy hides.
"""

import ast
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attending import zoo
from attending.interventions.hierarchical_attention import HierarchicalAttention, sentence_trees
from attending.zoo.recipes.stdlib_text import read_documents

PACKAGES = ("asyncio", "email", "logging", "tkinter", "xml")
ALL = (-1, -2, -3, -4, -5, -6)
CHOICES: Mapping[str, tuple[tuple[int, ...], bool]] = {  # layers, and whether along sentences
    "softmax": ((), True),
    "last": ((-1,), True),
    "late_alternating": ((-1, -3), True),
    "all": (ALL, True),
    "all_in_windows": (ALL, False),
}
WINDOWS = (4, 4)


@dataclass(frozen=True)
class Found:
    """What became of one choice of layers: accuracy, and cosine to the untouched embeddings."""

    accuracy: float
    cosine: float


def docstrings() -> dict[str, list[str]]:
    """By package, docstrings of 100 to 600 characters and at least three sentences."""
    found: dict[str, set[str]] = {name: set() for name in PACKAGES}
    for document in read_documents():
        package = document.path.split("/")[0].removesuffix(".py")
        if package not in found:
            continue
        for node in ast.walk(ast.parse(document.text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if 100 <= len(text) <= 600 and len(re.findall(r"[.!?](?:\s|$)", text)) >= 3:
                    found[package].add(text)
    return {name: sorted(texts) for name, texts in found.items()}


def run(
    seed: int, *, train_texts: int, test_texts: int, batch: int
) -> tuple[float, dict[str, Found]]:
    """The share of the dot products that sentences leave, and what became of each choice."""
    loaded = zoo.load("minilm")
    ends = loaded.tokenizer.convert_tokens_to_ids([".", "!", "?"])
    train: list[str] = []
    test: list[str] = []
    for name, texts in docstrings().items():
        # Chosen by a checksum of text and seed, which depends on no order of files.
        chosen = sorted(texts, key=lambda text: zlib.crc32(f"{seed} {text}".encode()))
        if len(chosen) < train_texts + test_texts:
            raise ValueError(
                f"test_texts: expected at most {len(chosen) - train_texts}, as many docstrings as "
                f"{name} has left, got {test_texts}."
            )
        train += chosen[:train_texts]
        test += chosen[train_texts : train_texts + test_texts]
    labels = torch.arange(len(PACKAGES))
    known = _embed(loaded, train, (), ends, batch, True)[0].unflatten(
        0, (len(PACKAGES), train_texts)
    )
    centroids = torch.nn.functional.normalize(known.mean(1), dim=-1)
    truth = labels.repeat_interleave(test_texts)
    found: dict[str, Found] = {}
    plain, left = None, 1.0
    for name, (layers, along_sentences) in CHOICES.items():
        embedded, share = _embed(loaded, test, layers, ends, batch, along_sentences)
        plain = embedded if plain is None else plain
        left = share
        accuracy = ((embedded @ centroids.mT).argmax(-1) == truth).float().mean()
        found[name] = Found(float(accuracy), float((embedded * plain).sum(-1).mean()))
    return left, found


@torch.no_grad()
def _embed(
    loaded: Any,
    texts: Sequence[str],
    layers: Sequence[int],
    ends: Sequence[int],
    batch: int,
    along_sentences: bool,
) -> tuple[Tensor, float]:
    """Unit embeddings, and sibling pairs of the trees over tokens squared."""
    vectors, pairs, full = [], 0, 0
    for start in range(0, len(texts), batch):
        inputs = loaded.tokenizer(
            list(texts[start : start + batch]), padding=True, return_tensors="pt"
        )
        lengths = inputs["attention_mask"].sum(1).tolist()
        trees = sentence_trees(inputs["input_ids"], ends, [loaded.tokenizer.cls_token_id])
        if layers:
            tree = trees if along_sentences else WINDOWS
            with HierarchicalAttention(tree=tree, layers=layers)(loaded.model):
                hidden = loaded.model(**inputs).last_hidden_state
        else:
            hidden = loaded.model(**inputs).last_hidden_state
        weights = inputs["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        vectors.append(torch.nn.functional.normalize(mean, dim=-1))
        for row, length in enumerate(lengths):
            ids = inputs["input_ids"][row : row + 1, :length]
            own = sentence_trees(ids, ends, [loaded.tokenizer.cls_token_id])[0]
            pairs, full = pairs + own.num_sibling_pairs, full + length**2
    return torch.cat(vectors), pairs / full
