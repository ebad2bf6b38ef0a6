"""What there is in the world of shapes, how often, and how a scene is drawn at random.

A *kind* of object is a colour and a shape, such as "red circle".  Kinds are not drawn uniformly:
a scene has a theme, most of its objects belong to the theme, and some themes are more common than
others.  So some kinds are frequent and some go together, as in photographs; that is what makes
the "popular" and the "adversarial" questions of POPE harder than random ones.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("small", "medium", "big")
BACKGROUNDS = ("plain", "shaded", "striped", "grainy")

# Generators are seeded below this number for training, and from it on for everything else.  Of a
# seed, PyTorch's generator of the CPU uses the lowest 32 bits alone: 2**32 is 0 again.
HELD_OUT_SEED = 2**31
MIN_OBJECTS, MAX_OBJECTS = 2, 6
# Half the width of an object of each size, as a fraction of the image's side.
RADII = (0.095, 0.13, 0.165)
OPACITIES = (0.3, 1.0)  # of the faintest objects, which are hard to make out, and the clearest
FAINT = (0.15, 0.4)  # scenes that are hard to see throughout
CELLS = 3  # objects stand near the centres of different cells of a 3 x 3 grid
JITTER = 0.06

KINDS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

# Each theme's kinds, the most typical first.  Themes themselves: the first is the most common.
THEMES = {
    "road": ("red circle", "yellow triangle", "white square", "black ring", "green circle"),
    "night": ("yellow star", "white star", "white ring", "blue circle", "purple star"),
    "clinic": ("red cross", "white cross", "white square", "green cross", "blue square"),
    "garden": ("green triangle", "red star", "yellow circle", "purple ring", "orange star"),
    "harbour": ("blue triangle", "white triangle", "orange ring", "red square", "blue ring"),
    "workshop": ("black square", "orange square", "black cross", "yellow ring", "orange triangle"),
    "toys": ("purple circle", "green square", "red triangle", "orange circle", "yellow cross"),
    "game": ("black circle", "purple square", "blue cross", "green star", "black star"),
}
# The share of an object that comes from the theme; the rest is uniform over all kinds.
THEME_SHARE = 0.8


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as tensors: what is drawn at random and what is rendered.

    Objects are in slots, of which the first ``count`` of a scene are used; a later slot lies in
    front of an earlier one.  Lengths are fractions of the image's side, y grows downward.

    Attributes:
        count: Number of objects.
        shape: Index into ``SHAPES``, as the next three into their lists.
        color: See ``shape``.
        texture: See ``shape``.
        size: See ``shape``.
        x: Centre of the object.
        y: Centre of the object.
        radius: Half its width.
        angle: Rotation in radians.
        tint: Added to its colour.
        opacity: How much of its colour covers what is behind it.
        background: Index into ``BACKGROUNDS``.
        shade: Colour of the background.
        grain: Seed of the noise of the pixels.
    """

    count: Int[Tensor, "scenes"]
    shape: Int[Tensor, "scenes slots"]
    color: Int[Tensor, "scenes slots"]
    texture: Int[Tensor, "scenes slots"]
    size: Int[Tensor, "scenes slots"]
    x: Float[Tensor, "scenes slots"]
    y: Float[Tensor, "scenes slots"]
    radius: Float[Tensor, "scenes slots"]
    angle: Float[Tensor, "scenes slots"]
    tint: Float[Tensor, "scenes slots"]
    opacity: Float[Tensor, "scenes slots"]
    background: Int[Tensor, "scenes"]
    shade: Float[Tensor, "scenes 3"]
    grain: Int[Tensor, "scenes"]

    @property
    def used(self) -> Bool[Tensor, "scenes slots"]:
        """Which slots hold an object."""
        return torch.arange(self.shape.shape[1]) < self.count[:, None]


def theme_weights() -> tuple[Float[Tensor, "themes"], Float[Tensor, "themes kinds"]]:
    """How probable each theme is, and each kind as the first object of a scene of a theme.

    Theme ``i`` has weight ``1 / (i + 2)`` and its ``j``-th kind weight ``1 / (j + 2)`` within the
    theme's share.
    """
    themes = torch.tensor([1 / (i + 2) for i in range(len(THEMES))])
    kinds = torch.full((len(THEMES), len(KINDS)), (1 - THEME_SHARE) / len(KINDS))
    for i, members in enumerate(THEMES.values()):
        typical = torch.tensor([1 / (j + 2) for j in range(len(members))])
        for name, weight in zip(members, typical / typical.sum(), strict=True):
            kinds[i, KINDS.index(name)] += THEME_SHARE * weight
    return themes / themes.sum(), kinds


def draw(
    scenes: int,
    generator: torch.Generator,
    *,
    min_objects: int = MIN_OBJECTS,
    max_objects: int = MAX_OBJECTS,
    opacity: tuple[float, float] = OPACITIES,
) -> SceneBatch:
    """Draw scenes at random; the objects of one scene are all of different kinds.

    Drawing without replacement is done by the largest of log-weights with Gumbel noise, for all
    scenes at once.
    """
    slots = max_objects

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def choice(options: int, *shape: int) -> Tensor:
        return torch.randint(options, shape, generator=generator)

    themes, kinds = theme_weights()
    theme = torch.multinomial(themes, scenes, replacement=True, generator=generator)
    gumbel = -torch.log(-torch.log(uniform(1e-9, 1 - 1e-7, scenes, len(KINDS))))
    kind = (kinds[theme].log() + gumbel).topk(slots, dim=1).indices
    # The likeliest kinds come first in a top-k, and would always lie behind the others.
    kind = kind.gather(1, torch.rand(scenes, slots, generator=generator).argsort(dim=1))
    count = torch.randint(min_objects, max_objects + 1, (scenes,), generator=generator)
    cell = torch.rand(scenes, CELLS * CELLS, generator=generator).argsort(dim=1)[:, :slots]
    size = choice(len(SIZES), scenes, slots)
    return SceneBatch(
        count=count,
        shape=kind % len(SHAPES),
        color=kind // len(SHAPES),
        texture=choice(len(TEXTURES), scenes, slots),
        size=size,
        x=(cell % CELLS + 0.5) / CELLS + uniform(-JITTER, JITTER, scenes, slots),
        y=(cell // CELLS + 0.5) / CELLS + uniform(-JITTER, JITTER, scenes, slots),
        radius=torch.tensor(RADII)[size] * uniform(0.95, 1.05, scenes, slots),
        angle=uniform(-math.pi / 12, math.pi / 12, scenes, slots),
        tint=uniform(-0.06, 0.06, scenes, slots),
        opacity=uniform(*opacity, scenes, slots),
        background=choice(len(BACKGROUNDS), scenes),
        shade=uniform(0.35, 0.65, scenes, 1) + uniform(-0.08, 0.08, scenes, 3),
        grain=choice(2**31, scenes),
    )
