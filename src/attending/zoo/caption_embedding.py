"""From captions to what a video model attends to: the small text encoder of ``wan-shapes``."""

import json
import string
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

PADDING = 0
_SETTINGS, _WEIGHTS = "caption_embedding.json", "caption_embedding.safetensors"


class CaptionEmbedding(nn.Module):
    """Words to vectors, which then look at their neighbours: ``wan.processor(captions)``.

    A caption is split into words, lower case and without punctuation.  Each word is a learned
    vector plus one for its place; two residual convolutions over five words let "blue" know which
    shape it colours.  Captions are filled up to ``length`` words with a learned padding, which the
    model attends to like any other word (``WanTransformer3DModel`` takes no mask of the text, and
    the original fills up, too).  The empty caption, padding alone, is the unconditional one of
    classifier-free guidance.

    Args:
        words: All words that a caption may have.
        dim: Of the vectors; the ``text_dim`` of the model.
        length: Most words of a caption.
    """

    def __init__(self, words: Sequence[str], dim: int, length: int) -> None:
        super().__init__()
        self.words = tuple(words)
        self.length = length
        self._index = {word: index for index, word in enumerate(self.words, start=PADDING + 1)}
        self.embedding = nn.Embedding(len(self.words) + 1, dim)
        self.positions = nn.Parameter(0.5 * torch.randn(length, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mixers = nn.ModuleList(nn.Conv1d(dim, dim, 5, padding=2) for _ in range(2))

    def tokens(self, captions: Sequence[str]) -> Int[Tensor, "batch length"]:
        """The number of each word, 0 for padding.

        Raises:
            ValueError: For a word that the model never read, or too long a caption.
        """
        if isinstance(captions, str):
            raise ValueError(f"expected a list of captions, got one string; give [{captions!r}]")
        table = torch.full((len(captions), self.length), PADDING)
        for row, caption in enumerate(captions):
            words = [word.strip(string.punctuation) for word in caption.lower().split()]
            unknown = sorted({word for word in words if word not in self._index})
            if unknown:
                raise ValueError(
                    f"expected captions of the words {', '.join(self.words)}, got "
                    f"{', '.join(map(repr, unknown))} in {caption!r}"
                )
            if len(words) > self.length:
                raise ValueError(
                    f"expected captions of at most {self.length} words, got {len(words)} in "
                    f"{caption!r}; name at most two objects"
                )
            table[row, : len(words)] = torch.tensor([self._index[word] for word in words])
        return table

    def forward(self, captions: Sequence[str]) -> Float[Tensor, "batch length dim"]:
        """What goes to the model as ``encoder_hidden_states``; ``""`` is no condition."""
        tokens = self.tokens(captions).to(self.positions.device)
        states: Tensor = self.embedding(tokens) + self.positions
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            states = states + F.gelu(mixer(norm(states).mT)).mT
        return states

    def save(self, folder: Path) -> None:
        """Write settings and weights, in float16, into an existing folder."""
        from safetensors.torch import save_file

        settings = {
            "words": list(self.words),
            "dim": self.positions.shape[1],
            "length": self.length,
        }
        text = json.dumps(settings, indent=1)
        (folder / _SETTINGS).write_text(text + "\n", encoding="utf-8")
        save_file(
            {name: value.detach().half().contiguous() for name, value in self.state_dict().items()},
            folder / _WEIGHTS,
        )

    @classmethod
    def load(cls, folder: Path) -> "CaptionEmbedding":
        """Read what :meth:`save` wrote, in evaluation mode and float32."""
        from safetensors.torch import load_file

        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        with torch.random.fork_rng(devices=[]):  # the first values are overwritten
            embedding = cls(settings["words"], settings["dim"], settings["length"])
        embedding.load_state_dict(load_file(folder / _WEIGHTS))
        return embedding.eval()
