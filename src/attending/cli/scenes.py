"""From scenes of the zoo to the batches that a model with eyes reads."""

from attending.cli.errors import CommandError
from attending.cli.loading import LoadedModel
from attending.cli.text import Batches

BATCH_ROWS = 16


def scene_batches(loaded: LoadedModel, text: str | None, max_tokens: int) -> Batches:
    """Rows of an image and text, as many as `max_tokens` tokens hold.

    Args:
        loaded: A zoo model with a processor.
        text: Each line that is not blank is a prompt about a scene of its own. `None` gives true
            captions of scenes, each behind the prompt that asks for it.
        max_tokens: At most so many, those of images included and padding not.

    Raises:
        CommandError: There is no prompt, or not one row fits.
    """
    from attending.zoo.shapes import DESCRIBE, make_scenes

    if text is None:
        scenes = make_scenes(max(1, max_tokens // loaded.processor.image_tokens), 0)
        prompts = [f"{DESCRIBE} {scene.captions[0]}" for scene in scenes]
    else:
        prompts = [line for line in text.splitlines() if line.strip()]
        if not prompts:
            raise CommandError("the text has no line with a prompt; give one for each scene")
        scenes = make_scenes(len(prompts), 0)
    inputs, tokens, rows = [], 0, 0
    for start in range(0, len(prompts), BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        batch = loaded.processor(scenes[part], prompts[part])
        lengths = batch["attention_mask"].sum(1)
        fits = int((tokens + lengths.cumsum(0) <= max_tokens).sum())
        if fits:
            tokens, rows = tokens + int(lengths[:fits].sum()), rows + fits
            values = {name: value[:fits].to(loaded.model.device) for name, value in batch.items()}
            values["pixel_values"] = values["pixel_values"].to(loaded.model.dtype)
            inputs.append(values)
        if fits < len(lengths):
            break
    if not inputs:
        raise CommandError(
            f"--max-tokens {max_tokens} leaves no room for an image and its prompt, which take "
            f"{int(lengths[0])}; give more"
        )
    return Batches(inputs=inputs, tokens=tokens, whole=text is None or rows == len(prompts))
