"""A task that a window cannot do: values that stand with their keys far back in a long prompt.

    filler k1 v1 filler filler k2 v2 ... | k2 [mask] k1 [mask] ...

The model is a EuroBERT of two layers, trained in seconds. Each token's embedding has that of the
token before it added, so that finding a value takes attention one step; and the sequences grow
while it trains, since recall is found much sooner in short ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from attending.papers._sparsed_trajectory import Setup, compare

KINDS = 96  # of keys, of values, and of filler
MASK = 3 * KINDS
TOKENS_PER_STEP = 4096
WIDTH, HEADS, LAYERS = 64, 2, 2
LEARNING_RATE, WARM_UP = 3e-3, 30


@dataclass(frozen=True)
class Training:
    """How many steps at which length."""

    lengths: tuple[int, ...]
    steps: tuple[int, ...]


def measure(seed: int, setup: Setup, rows: int, training: Training) -> dict[str, float]:
    """Train a model, and compare on new sequences; `right_dense` tells whether it learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
    train(model, training, generator)
    text = sequences(rows, setup.prompt, setup.answer, generator)
    masked = torch.zeros_like(text, dtype=torch.bool)
    masked[:, setup.prompt + 1 :: 2] = True
    return compare(model, text, masked, setup, MASK)[0]


def sequences(count: int, prompt: int, answer: int, generator: torch.Generator) -> Tensor:
    """Prompts with `answer` pairs at random places among filler, and half of the keys asked."""
    slots = prompt // 2

    def some(of: int, many: int) -> Tensor:
        """That many of the numbers below, without repetition."""
        return torch.rand(count, of, generator=generator).argsort(1)[:, :many]

    tokens = torch.randint(2 * KINDS, 3 * KINDS, (count, prompt), generator=generator)
    place, keys = some(slots, answer), some(KINDS, answer)
    values = torch.randint(KINDS, 2 * KINDS, (count, answer), generator=generator)
    tokens.scatter_(1, 2 * place, keys).scatter_(1, 2 * place + 1, values)
    asked = some(answer, answer // 2)
    pairs = torch.stack([keys.gather(1, asked), values.gather(1, asked)], -1)
    return torch.cat([tokens, pairs.flatten(1)], dim=1)


class WithTheOneBefore(nn.Module):
    """An embedding of each token, and one of the token before it."""

    def __init__(self, now: nn.Embedding) -> None:
        super().__init__()
        self.now = now
        self.before = nn.Embedding.from_pretrained(torch.randn_like(now.weight) * 0.1, freeze=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings `[batch, tokens, width]`."""
        before = pad(input_ids, (1, 0), value=MASK)[:, :-1]
        embedded: Tensor = self.now(input_ids) + self.before(before)
        return embedded


def build() -> Any:
    """The model, untrained."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    config = EuroBertConfig(
        vocab_size=3 * KINDS + 1,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # keys match at any distance
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        mask_token_id=MASK,
        tie_word_embeddings=False,
    )
    model = EuroBertForMaskedLM(config)
    model.model.embed_tokens = WithTheOneBefore(model.model.embed_tokens)
    return model


def train(model: Any, training: Training, generator: torch.Generator) -> None:
    """Learn to name masked values, of which any share may be masked."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    total, step = sum(training.steps), 0
    model.train()
    for length, steps in zip(training.lengths, training.steps, strict=True):
        answer = length // 8
        for _ in range(steps):
            rate = LEARNING_RATE * min(1, (step + 1) / WARM_UP, 4 * (total - step) / total)
            optimizer.param_groups[0]["lr"] = rate
            tokens = sequences(TOKENS_PER_STEP // length, length - answer, answer, generator)
            share = torch.rand(len(tokens), 1, generator=generator).clamp_min(0.1)
            masked = torch.rand(tokens.shape, generator=generator) < share
            masked[:, : length - answer] = False
            masked[:, length - answer :: 2] = False
            hidden = model.model(input_ids=tokens.masked_fill(masked, MASK)).last_hidden_state
            loss = cross_entropy(model.lm_head(hidden[masked]), tokens[masked])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
    model.eval()
