"""The experiment of Deconstructing attention: associative recall by a small Llama.

A sequence shows pairs, each one token that stands for a key and a value, and then asks for the
keys in another order, one token each; the model has to answer with the value that this key has *in
this sequence*. So the loss cannot be lowered without mixing tokens. (Key and value in one token,
and not in two, so that one layer can find the answer: that is learned in hundreds of steps, and
what takes two layers in thousands.) All models are `LlamaForCausalLM` with multi-head attention,
changed by `convert_mixers`, and differ in nothing but that; the weights start the same and the
sequences are the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attending.conversion._mixer_layers import Variant
from attending.conversion.mixers import Layout, convert_mixers


@dataclass(frozen=True)
class Task:
    """Associative recall.

    Attributes:
        keys, values: how many there are of each.
        pairs: shown in each sequence, and asked for once each.
    """

    keys: int
    values: int
    pairs: int

    @property
    def vocabulary(self) -> int:
        """Tokens: pairs, then keys in a question, then values in an answer."""
        return self.keys * self.values + self.keys + self.values

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences `[batch, 2 * pairs]`, and the answers `[batch, pairs]` to the second half."""
        keys = torch.rand(batch, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values = torch.randint(self.values, (batch, self.pairs), generator=generator)
        asked = torch.rand(batch, self.pairs, generator=generator).argsort(1)
        questions = self.keys * self.values + keys.gather(1, asked)
        answers = self.keys * self.values + self.keys + values.gather(1, asked)
        return torch.cat([keys * self.values + values, questions], 1), answers


def run(
    variants: Sequence[Variant],
    seed: int,
    *,
    task: Mapping[str, int],
    dim: int,
    heads: int,
    layers: int,
    batch: int,
    steps: int,
    learning_rate: float,
    looks: int,
    test_sequences: int,
) -> Mapping[str, Sequence[tuple[int, float]]]:
    """Train each model, and measure the accuracy of its answers on new sequences on the way.

    Args:
        variants: each in the layouts "uniform" and "even"; the plain Llama comes beside them.
        seed: of weights, sequences and noise.
        task: the fields of `Task`.
        dim, heads, layers: of the Llama.
        batch, steps, learning_rate: of AdamW, cosine schedule, 5 % warm-up.
        looks: how often accuracy is measured.
        test_sequences: on how many.

    Returns:
        `(step, accuracy)` of "standard", "mlp_uniform", "mlp_even", ...
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    recall = Task(**task)
    config = LlamaConfig(
        vocab_size=recall.vocabulary,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2 * recall.pairs,
        initializer_range=dim**-0.5,  # the usual 0.02 is meant for hundreds of channels
        use_cache=False,
    )
    test = recall.sample(test_sequences, torch.Generator().manual_seed(seed + 10_000))
    layouts: tuple[Layout, ...] = ("uniform", "even")
    models = [
        (f"{variant}_{layout}", variant, layout) for variant in variants for layout in layouts
    ]
    curves: dict[str, Sequence[tuple[int, float]]] = {}
    with torch.random.fork_rng(devices=[]):
        for name, variant, layout in [("standard", None, None), *models]:
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
            if variant is not None and layout is not None:
                convert_mixers(model, variant, layout=layout, seed=seed)
            data = torch.Generator().manual_seed(seed + 20_000)
            curves[name] = _train(model, recall, test, data, batch, steps, learning_rate, looks)
    return curves


def _train(
    model: torch.nn.Module,
    task: Task,
    test: tuple[Tensor, Tensor],
    data: torch.Generator,
    batch: int,
    steps: int,
    learning_rate: float,
    looks: int,
) -> list[tuple[int, float]]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, steps, pct_start=0.05, cycle_momentum=False
    )
    curve = []
    for step in range(steps + 1):
        if step % max(steps // looks, 1) == 0:
            curve.append((step, _accuracy(model, *test)))
        if step == steps:
            break
        words, answers = task.sample(batch, data)
        logits = model(input_ids=words).logits[:, task.pairs :]
        loss = cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return curve


@torch.no_grad()
def _accuracy(model: torch.nn.Module, words: Tensor, answers: Tensor) -> float:
    model.eval()
    found = model(input_ids=words).logits[:, -answers.shape[1] :].argmax(-1)
    model.train()
    return float((found == answers).float().mean())
