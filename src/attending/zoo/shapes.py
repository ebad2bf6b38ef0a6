"""Scenes of coloured shapes in which all is known: objects, places, pixels, the right answers.

>>> from attending.zoo import shapes
>>> scene = shapes.make_scene(seed=8)
>>> ", ".join(thing.name for thing in scene.objects)
'blue circle, green star, purple star, white star, white ring'
>>> scene.image().shape, scene.masks().shape
(torch.Size([3, 32, 32]), torch.Size([5, 32, 32]))

A scene holds two to six objects on a plain or textured background.  It is a value: the same seed
gives the same scene, ``dataclasses.replace`` edits it (take an object away, move one, let one
fade), and ``image(size)`` paints it at any resolution.  Some objects are faint, so that seeing is
not easy and a model may be led by what it expects.  Kinds of objects are not equally frequent and
some go together, so the questions of POPE (random, popular, adversarial) are what they are on
photographs; see :func:`pope_questions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.zoo import _shapes_render
from attending.zoo._shapes_text import (
    DESCRIBE,
    LIST,
    POPE_KINDS,
    Question,
    count_questions,
    full_caption,
    mentions,
    pope_questions,
    presence_question,
    short_caption,
    spatial_questions,
)
from attending.zoo._shapes_world import (
    BACKGROUNDS,
    COLORS,
    FAINT,
    HELD_OUT_SEED,
    KINDS,
    MAX_OBJECTS,
    MIN_OBJECTS,
    OPACITIES,
    SHAPES,
    SIZES,
    TEXTURES,
    THEMES,
    SceneBatch,
    draw,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "DESCRIBE",
    "FAINT",
    "KINDS",
    "LIST",
    "POPE_KINDS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "THEMES",
    "Question",
    "Scene",
    "SceneObject",
    "count_questions",
    "make_scene",
    "make_scenes",
    "mentions",
    "pope_questions",
    "presence_question",
    "render",
    "spatial_questions",
]


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape.

    Attributes:
        shape: One of ``SHAPES``.
        color: One of ``COLORS``.
        texture: One of ``TEXTURES``.
        size: One of ``SIZES``.
        x: Its centre, from 0 at the left to 1 at the right.
        y: Its centre, from 0 at the top to 1 at the bottom.
        radius: Half its width, as a fraction of the image's side.
        angle: Its rotation in radians.
        tint: What is added to the red, green and blue of its colour.
        opacity: From 0 to 1, how much it covers what is behind it; faint objects are hard to see.
    """

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    tint: float = 0.0
    opacity: float = 1.0

    @property
    def name(self) -> str:
        """Colour and shape, such as ``"red circle"``: what questions and captions call it."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """In which third of the image it is, such as ``"top left"``, ``"left"`` or ``"middle"``."""
        row = ("top", "", "bottom")[min(2, int(3 * self.y))]
        column = ("left", "", "right")[min(2, int(3 * self.x))]
        return f"{row} {column}".strip() or "middle"


@dataclass(frozen=True)
class Scene:
    """Objects before a background.

    Attributes:
        objects: From the one at the back to the one in front; all of different names.
        background: One of ``BACKGROUNDS``.
        shade: Red, green and blue of the background.
        grain: Seed of the noise of the pixels.
        size: Pixels along each side, unless ``image`` or ``masks`` are asked for another number.
    """

    objects: tuple[SceneObject, ...]
    background: str = "plain"
    shade: tuple[float, float, float] = (0.5, 0.5, 0.5)
    grain: int = 0
    size: int = 32

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the objects, from the back to the front."""
        return tuple(thing.name for thing in self.objects)

    @property
    def captions(self) -> tuple[str, str]:
        """The full caption (sizes, textures, background) and the short one (names only)."""
        return full_caption(self), short_caption(self)

    def image(self, size: int | None = None) -> Float[Tensor, "3 height width"]:
        """Paint the scene, red, green and blue in [0, 1]."""
        return render([self], size)[0]

    def masks(self, size: int | None = None) -> Bool[Tensor, "objects height width"]:
        """The pixels that show each object: it covers at least half of the pixel and no object in
        front of it does.  No pixel shows two objects."""
        side = _side([self], size)
        return _shapes_render.visible(as_batch([self]), side)[0, : len(self.objects)]


def make_scene(
    seed: int,
    size: int = 32,
    *,
    min_objects: int = MIN_OBJECTS,
    max_objects: int = MAX_OBJECTS,
    opacity: tuple[float, float] = OPACITIES,
) -> Scene:
    """Draw one scene: ``make_scenes(1, seed, ...)[0]``."""
    return make_scenes(
        1, seed, size, min_objects=min_objects, max_objects=max_objects, opacity=opacity
    )[0]


def make_scenes(
    count: int,
    seed: int,
    size: int = 32,
    *,
    min_objects: int = MIN_OBJECTS,
    max_objects: int = MAX_OBJECTS,
    opacity: tuple[float, float] = OPACITIES,
) -> list[Scene]:
    """Draw ``count`` scenes; the same arguments always give the same scenes.

    Args:
        count: How many.
        seed: From 0 up to 2**31.  The scenes that ``llava-shapes`` is trained on have seeds of
            their own, so all scenes drawn here are held out.
        size: Pixels along each side of the images.
        min_objects: At least 1.
        max_objects: At most 6.
        opacity: Of the faintest and of the clearest objects.  Models are trained on the default;
            ``FAINT`` makes scenes that are hard to see, in which they make up more.
    """
    check_drawn(count, seed, min_objects, max_objects, opacity)
    check_size(size)
    generator = torch.Generator().manual_seed(HELD_OUT_SEED + seed)
    batch = draw(
        count, generator, min_objects=min_objects, max_objects=max_objects, opacity=opacity
    )
    return from_batch(batch, size)


def render(
    scenes: Sequence[Scene], size: int | None = None
) -> Float[Tensor, "scenes 3 height width"]:
    """Paint several scenes at once, red, green and blue in [0, 1].

    Args:
        scenes: What to paint.
        size: Pixels along each side; ``None`` takes that of the scenes, which must then agree.
    """
    side = _side(scenes, size)
    if not scenes:
        return torch.zeros(0, 3, side, side)
    return _shapes_render.render(as_batch(scenes), side)


def check_drawn(
    count: int, seed: int, min_objects: int, max_objects: int, opacity: tuple[float, float]
) -> None:
    """Refuse what cannot be drawn."""
    if not 0 <= seed < HELD_OUT_SEED:
        raise ValueError(f"expected seed from 0 up to 2**31, got {seed}")
    if count < 0:
        raise ValueError(f"expected count of at least 0, got {count}")
    if not 1 <= min_objects <= max_objects <= MAX_OBJECTS:
        raise ValueError(
            f"expected 1 <= min_objects <= max_objects <= {MAX_OBJECTS}, got min_objects="
            f"{min_objects} and max_objects={max_objects}"
        )
    if not 0 <= opacity[0] <= opacity[1] <= 1:
        raise ValueError(f"expected opacity as two rising numbers from 0 to 1, got {opacity}")


def check_size(size: int) -> None:
    """Refuse images too small to show a shape."""
    if size < 8:
        raise ValueError(f"expected size of at least 8 pixels, got {size}")


def from_batch(batch: SceneBatch, size: int) -> list[Scene]:
    """One value per scene from the tensors of many."""
    columns = {field.name: getattr(batch, field.name).tolist() for field in fields(batch)}
    return [
        Scene(
            objects=tuple(
                SceneObject(
                    shape=SHAPES[columns["shape"][i][j]],
                    color=COLORS[columns["color"][i][j]],
                    texture=TEXTURES[columns["texture"][i][j]],
                    size=SIZES[columns["size"][i][j]],
                    x=columns["x"][i][j],
                    y=columns["y"][i][j],
                    radius=columns["radius"][i][j],
                    angle=columns["angle"][i][j],
                    tint=columns["tint"][i][j],
                    opacity=columns["opacity"][i][j],
                )
                for j in range(columns["count"][i])
            ),
            background=BACKGROUNDS[columns["background"][i]],
            shade=tuple(columns["shade"][i]),
            grain=columns["grain"][i],
            size=size,
        )
        for i in range(len(columns["count"]))
    ]


def as_batch(scenes: Sequence[Scene]) -> SceneBatch:
    """The tensors of scenes; unused slots repeat what renders as nothing."""
    slots = max(1, *(len(scene.objects) for scene in scenes))
    filler = SceneObject(SHAPES[0], COLORS[0], TEXTURES[0], SIZES[0], 0.0, 0.0, 0.1)
    rows = [(*scene.objects, *[filler] * (slots - len(scene.objects))) for scene in scenes]
    lists = {"shape": SHAPES, "color": COLORS, "texture": TEXTURES, "size": SIZES}
    indices = {
        name: torch.tensor([[_index(name, getattr(o, name), options) for o in row] for row in rows])
        for name, options in lists.items()
    }
    numbers = {
        name: torch.tensor([[getattr(thing, name) for thing in row] for row in rows])
        for name in ("x", "y", "radius", "angle", "tint", "opacity")
    }
    return SceneBatch(
        count=torch.tensor([len(scene.objects) for scene in scenes]),
        background=torch.tensor(
            [_index("background", scene.background, BACKGROUNDS) for scene in scenes]
        ),
        shade=torch.tensor([scene.shade for scene in scenes]),
        grain=torch.tensor([scene.grain for scene in scenes]),
        **indices,
        **numbers,
    )


def _index(name: str, value: str, options: tuple[str, ...]) -> int:
    if value not in options:
        raise ValueError(f"expected {name} to be one of {', '.join(options)}, got {value!r}")
    return options.index(value)


def _side(scenes: Sequence[Scene], size: int | None) -> int:
    if size is None:
        sizes = {scene.size for scene in scenes}
        if len(sizes) != 1:
            raise ValueError(
                f"expected scenes of one size, got sizes {sorted(sizes)}; give size=, to which all "
                "are painted"
            )
        (size,) = sizes
    check_size(size)
    return size
