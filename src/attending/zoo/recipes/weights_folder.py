"""The folder that a recipe ships: weights, tokenizer and card, for ``from_pretrained`` to load."""

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch


def write_weights(model: Any, tokenizer: Any, folder: Path, card: dict[str, Any]) -> None:
    """Write a folder that ``from_pretrained`` loads, its weights in float16.

    A ``tokenizer`` of ``None`` leaves it out, for a model that reads with another model's.

    Files are prepared aside and moved in one by one, so that whoever reads the folder meanwhile
    never meets half a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as name:
        aside = Path(name)
        stored = copy.deepcopy(model)
        # diffusers' own `to` warns that some modules are best kept in float32; on loading they are.
        torch.nn.Module.to(stored, torch.float16)
        stored.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        text = json.dumps(card, indent=1, ensure_ascii=False)
        (aside / "card.json").write_text(text + "\n", encoding="utf-8")
        for file in sorted(aside.iterdir()):
            file.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(file, folder / file.name)
