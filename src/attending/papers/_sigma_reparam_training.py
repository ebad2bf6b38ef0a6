"""The experiment: small transformers with and without sigmaReparam, over learning rates.

Two tasks with real classes of transformers, trained by Adam at a constant rate without warm-up,
weight decay or clipping, which is where the paper says that plain models fail:

- `digits`: `ViTForImageClassification` on scikit-learn's digits, 16 patches of 2 x 2 and a class
  token. Quality is accuracy on 500 images that were not trained on;
- `text`: `GPT2LMHeadModel` on the source of the standard library, in the tokens of llama-stdlib.
  Quality is the mean loss on held-out files, in nats per token.

Variants: `norm` is the model with its LayerNorms; `plain` has an Identity in place of each of them;
`ours` is `plain` with sigmaReparam on every linear layer and convolution (embeddings and the output
layer that is tied to one stay as they are). All three start from the same weights, drawn with std
fan_in^-0.5 instead of 0.02: with that, narrow models without LayerNorm do not start to learn, see
`attending.nn.sigma_reparam`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attending.core import statistics
from attending.nn import sigma_reparam
from attending.taps import tap
from attending.zoo.recipes.byte_bpe import encode_document
from attending.zoo.recipes.packing import PackedTokens
from attending.zoo.recipes.stdlib_text import read_documents, split

# name: (keeps its LayerNorms, has sigmaReparam)
VARIANTS = {
    "norm": (True, False),
    "plain": (False, False),
    "ours": (False, True),
}
TEST_IMAGES = 500


class Measured(NamedTuple):
    """The state of a model on held-out data: entropies are means of a layer's rows, in nats."""

    quality: float
    entropies: list[float]


class Task(NamedTuple):
    """What a model is trained on: its untrained form, the loss of a step, and the measurement."""

    build: Callable[[int], Any]
    loss: Callable[[Any, int], Tensor]
    measure: Callable[[Any], Measured]


@dataclass
class Trained:
    """What became of one model."""

    quality: float = math.nan
    diverged: bool = False
    steps: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)  # of the lowest layer, at those steps

    @property
    def lowest_entropy(self) -> float:
        """The lowest layer at its lowest, over the whole training; nan if there is no number."""
        return min((one for one in self.entropies if math.isfinite(one)), default=math.nan)


def train(task: Task, variant: str, rate: float, settings: Mapping[str, Any], seed: int) -> Trained:
    """Train one model. Diverged: its loss is no number, or ends above twice the first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = prepare(task.build(seed), *VARIANTS[variant], settings["gamma_init"])
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    outcome = Trained()
    losses: list[float] = []
    for step in range(settings["steps"]):
        loss = task.loss(model, step)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            outcome.diverged = True
            return outcome
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % settings["measure_every"] == 0 or step + 1 == settings["steps"]:
            measured = task.measure(model)
            outcome.quality = measured.quality
            outcome.steps.append(step + 1)
            outcome.entropies.append(min(measured.entropies))
    outcome.diverged = not sum(losses[-10:]) <= 2 * losses[0] * len(losses[-10:])
    return outcome


def prepare(model: nn.Module, keeps_norm: bool, reparametrised: bool, gamma_init: Any) -> nn.Module:
    """The variant of an untrained model; see the module's docstring."""
    from transformers.pytorch_utils import Conv1D

    tied = [name for name, _ in model.named_modules() if name == "lm_head"]
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):  # with lm_head the embedding tied to it
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, Conv1D):  # [in, out]
            nn.init.normal_(module.weight, std=len(module.weight) ** -0.5)
    if not keeps_norm:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.LayerNorm):
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, nn.Identity())
    if reparametrised:
        sigma_reparam.convert(model, gamma_init=gamma_init, exclude=tied)
    return model.train()


@torch.no_grad()
def measure(model: Any, run: Callable[[], Tensor], quality: Callable[[Tensor], Tensor]) -> Measured:
    """Quality and the mean entropy of each layer, from one pass in eval mode."""
    model.eval()
    with tap(model) as calls:
        output = run()
    model.train()
    rows = (
        statistics.entropy(
            call.query, call.key, call.attn_mask, call.is_causal, call.scale, call.enable_gqa
        )
        for call in calls
    )
    return Measured(float(quality(output)), [float(one.mean()) for one in rows])


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(digits.target)[order]


def digits_task(settings: Mapping[str, Any], seed: int) -> Task:
    """Classifying digits with a vision transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    images, labels = _digits()
    training, test = slice(TEST_IMAGES, None), slice(0, TEST_IMAGES)
    generator = torch.Generator().manual_seed(seed)
    count = len(images) - TEST_IMAGES
    batches = torch.randint(count, (settings["steps"], settings["rows"]), generator=generator)

    def build(seed: int) -> Any:
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=settings["hidden"],
                num_hidden_layers=settings["layers"],
                num_attention_heads=settings["heads"],
                intermediate_size=4 * settings["hidden"],
                image_size=8,
                patch_size=2,
                num_channels=1,
                num_labels=10,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            )
        )

    def loss(model: Any, step: int) -> Tensor:
        chosen = batches[step]
        return cross_entropy(model(images[training][chosen]).logits, labels[training][chosen])

    def correct(logits: Tensor) -> Tensor:
        return (logits.argmax(-1) == labels[test]).double().mean()

    return Task(
        build, loss, lambda model: measure(model, lambda: model(images[test]).logits, correct)
    )


@lru_cache(maxsize=1)
def _text(files: int) -> tuple[Tensor, Tensor, int, int]:
    """Tokens to train on, held-out tokens, the begin token, and the size of the vocabulary."""
    from transformers import AutoTokenizer

    from attending.zoo.llama_stdlib import folder

    tokenizer = AutoTokenizer.from_pretrained(folder())
    training, held_out = split(read_documents(), 40)
    tokens = [
        torch.cat([encode_document(tokenizer, one.text) for one in part[:files]])
        for part in (training, held_out)
    ]
    return tokens[0], tokens[1], tokenizer.bos_token_id, len(tokenizer)


def text_task(settings: Mapping[str, Any], seed: int) -> Task:
    """Predicting the next token of Python source."""
    from transformers import GPT2Config, GPT2LMHeadModel

    training, held_out, begin, vocabulary = _text(settings["files"])
    data = PackedTokens(training, begin, seed)
    context = settings["context"]
    unseen = PackedTokens(held_out, begin, 0).batch(0, settings["held_out_rows"], context)

    def build(seed: int) -> Any:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_embd=settings["hidden"],
                n_layer=settings["layers"],
                n_head=settings["heads"],
                n_positions=context,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=begin,
                eos_token_id=begin,
                attn_implementation="sdpa",
            )
        )

    def next_token(logits: Tensor, batch: Tensor) -> Tensor:
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def loss(model: Any, step: int) -> Tensor:
        batch = data.batch(step, settings["rows"], context)
        return next_token(model(batch[:, :-1], use_cache=False).logits, batch)

    return Task(
        build,
        loss,
        lambda model: measure(
            model,
            lambda: model(unseen[:, :-1], use_cache=False).logits,
            lambda logits: next_token(logits, unseen),
        ),
    )


TASKS = {"digits": digits_task, "text": text_task}


def run(settings: Mapping[str, Any], seed: int) -> dict[tuple[str, str, float], Trained]:
    """Train all cells: task, variant and learning rate. The same weights and batches for each."""
    return {
        (name, variant, rate): train(
            TASKS[name](settings[name], seed), variant, rate, settings[name], seed
        )
        for name in TASKS
        for variant in VARIANTS
        for rate in settings[name]["rates"]
    }
