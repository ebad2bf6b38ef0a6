"""What `attending diagnose llava-shapes` reads."""

import pytest
import torch

from attending.cli.errors import CommandError
from attending.cli.loading import LoadedModel, load_model
from attending.cli.scenes import BATCH_ROWS, scene_batches


@pytest.fixture(scope="module")
def llava() -> LoadedModel:
    return load_model("llava-shapes", device="cpu", dtype=torch.bfloat16)


def test_captions_of_scenes_without_a_text(llava: LoadedModel) -> None:
    read = scene_batches(llava, None, 2000)
    rows = [len(batch["input_ids"]) for batch in read.inputs]
    assert read.whole
    assert rows[0] == BATCH_ROWS
    assert read.tokens == sum(int(batch["attention_mask"].sum()) for batch in read.inputs)
    assert 1800 < read.tokens <= 2000
    batch = read.inputs[0]
    assert batch["pixel_values"].dtype == torch.bfloat16
    text = llava.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert text.split(".")[0].endswith("describe the image")
    assert text.endswith("background.")


def test_a_prompt_in_each_line(llava: LoadedModel) -> None:
    read = scene_batches(llava, "Is there a red ring in the image?\n\nList the objects.\n", 4096)
    (batch,) = read.inputs
    assert read.whole
    assert len(batch["input_ids"]) == 2
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert not torch.equal(*batch["pixel_values"])
    part = scene_batches(llava, "List the objects.\n" * 50, 1000)
    assert not part.whole
    assert part.tokens <= 1000


def test_nothing_to_read(llava: LoadedModel) -> None:
    with pytest.raises(CommandError, match="no line with a prompt"):
        scene_batches(llava, " \n", 4096)
    with pytest.raises(CommandError, match=r"--max-tokens 20 leaves no room"):
        scene_batches(llava, None, 20)
