"""A tiny Llama to train, its batches, and what a probe should say of it, by dense float64."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import attending as at
from attending.taps.running import evaluating

VOCABULARY = 40


def llama(dropout: float = 0.0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_dropout": dropout,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).train()


def text(seed: int, batch: int = 3, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def padded_probe() -> dict[str, Tensor]:
    """Padding on the left, on the right and none."""
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, -3:] = 0
    return {"input_ids": text(99), "attention_mask": mask}


def train_one(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step of a training."""
    batch = text(seed)
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@dataclass
class Dense:
    """Per head, from the map itself."""

    entropy: Tensor
    normalized: Tensor
    sink: Tensor
    first: Tensor
    logit: Tensor


def dense(
    call: at.AttentionCall, asking: list[list[int]] | None, seen: list[list[int]] | None
) -> Dense:
    """The definitions, one sequence, head and query at a time.

    Args:
        call: what the model asked for.
        asking, seen: for each sequence the queries and keys that are no padding; None for all.
    """
    query, key = call.query.double(), call.key.double()
    batch, heads, queries, _ = query.shape
    key = key.repeat_interleave(heads // key.shape[1], 1)
    scores = call.softmax_scale * query @ key.transpose(-1, -2)
    if call.is_causal:
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        scores = scores.masked_fill(hidden, -math.inf)
    if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.attn_mask, -math.inf)
    elif call.attn_mask is not None:
        mask = call.attn_mask.double()
        scores = scores + mask.masked_fill(mask < -1e30, -math.inf)
    found = Dense(*torch.zeros(5, heads).double())
    found.logit.fill_(-math.inf)
    rows, counted = 0, torch.zeros(heads)
    for item in range(batch):
        ask = list(range(queries)) if asking is None else asking[item]
        keys = list(range(scores.shape[-1])) if seen is None else seen[item]
        rows += len(ask)
        for head in range(heads):
            received = dict.fromkeys(keys, 0.0)
            seen_by = dict.fromkeys(keys, 0)
            for i in ask:
                visible = [j for j in keys if scores[item, head, i, j] > -math.inf]
                row = scores[item, head, i, visible]
                p = row.softmax(0)
                entropy = float(torch.special.entr(p).sum())
                found.entropy[head] += entropy
                found.logit[head] = max(found.logit[head], row.max())
                if len(visible) > 1:
                    found.normalized[head] += entropy / math.log(len(visible))
                    counted[head] += 1
                for j, value in zip(visible, p.tolist(), strict=True):
                    received[j] += value
                    seen_by[j] += 1
            found.first[head] += received[keys[0]]
            old = [j for j in keys if seen_by[j] >= max(1, len(ask) / 4)]
            found.sink[head] += max(received[j] / seen_by[j] for j in old)
    found.entropy /= rows
    found.first /= rows
    found.sink /= batch
    found.normalized /= counted
    return found


def probe_calls(model: nn.Module, probe: Mapping[str, Tensor]) -> list[at.AttentionCall]:
    with torch.no_grad(), evaluating(model), at.tap(model) as calls:
        model(**probe)
    return calls


def weights(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]
