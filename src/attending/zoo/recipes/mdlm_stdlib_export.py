"""Turns a training run of ``mdlm-stdlib`` into the folder that is shipped, with its data card.

Every figure of the card is measured here, on the weights as they are stored, but those of
``llama-stdlib`` and the compressors on the same files, which are read from that model's card.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.diffusion.masked_text import sample_masked_text
from attending.zoo import llama_stdlib, mdlm_stdlib
from attending.zoo.recipes.bits_per_byte import bits_per_byte
from attending.zoo.recipes.byte_bpe import encode_document
from attending.zoo.recipes.checkpoint import load_checkpoint, read_state
from attending.zoo.recipes.llama_stdlib_export import TABLES, average
from attending.zoo.recipes.mdlm_stdlib import (
    MdlmStdlibRecipe,
    build_model,
    choose_masked,
    document_rows,
    masked_nats,
    spread_times,
    start_of,
)
from attending.zoo.recipes.packing import PackedTokens
from attending.zoo.recipes.stdlib_text import LICENSE, Document, read_documents, split
from attending.zoo.recipes.training_loop import CHECKPOINT, check_same
from attending.zoo.recipes.weights_folder import write_weights

RATIOS = (0.15, 0.3, 0.5, 0.7, 0.9)
PROMPT = 'class Stack:\n    """A list of which only the last item is seen."""\n\n    def '
ROWS = 8  # read at once
LIMITS = (
    "Fills gaps in Python. Text of its own soon repeats itself, as the sample shows.",
    "Trained for minutes, for less than one pass over the text; llama-stdlib, which it starts "
    "from, is the better writer.",
    "Its figure is an upper bound, and each row of the context is scored by itself, while "
    "llama-stdlib is measured exactly and with at least half a context before each token.",
    "Knows only the standard library of one Python version.",
    "Was never shown padding; prompts of different lengths go by the attention mask.",
    "Every training row starts with the bos token, mostly in mid-file; start inputs with bos, as "
    "the tokenizer does by itself.",
    "The split is by file, and files of encodings/ are nearly copies of each other, so figures "
    "without them are given too.",
    "Meant for trying attention methods on a real denoiser in seconds, not for use in products.",
)


def measure(
    model: Any, tokenizer: Any, documents: list[Document], context: int, draws: int
) -> list[dict[str, Any]]:
    """The bound of each document in bits per byte, with its standard error.

    A document is cut into rows of the context.  Each row is read ``draws`` times with masks at
    times that are spread evenly over the whole document; which, its path decides.  The bound of
    the recipe's docstring is averaged over the draws and summed over the rows.  The standard error
    is that of independent draws, which spread ones do not exceed in practice.
    """
    measured = []
    for document in documents:
        rows, real = document_rows(
            [encode_document(tokenizer, document.text)],
            tokenizer.bos_token_id,
            tokenizer.pad_token_id,
            context,
        )
        width = int(real.sum(1).max())
        rows, real = rows[:, :width], real[:, :width]
        can = real.clone()
        can[:, 0] = False
        generator = _generator_of(document.path)
        offset = torch.rand((), generator=generator, dtype=torch.float64).item()
        # Draw after draw, so that the draws of one row lie far apart in time.
        times = spread_times(draws * len(rows), offset)
        tokens, attended = rows.repeat(draws, 1), real.repeat(draws, 1)
        masked = choose_masked(can.repeat(draws, 1), times, generator)
        bounds = torch.cat(
            [
                masked_nats(
                    model,
                    tokens[first : first + ROWS],
                    masked[first : first + ROWS],
                    tokenizer.mask_token_id,
                    attended[first : first + ROWS],
                )[0]
                for first in range(0, len(tokens), ROWS)
            ]
        )
        bounds = (bounds * can.repeat(draws, 1).sum(1) / masked.sum(1)).view(draws, len(rows))
        measured.append(
            {
                "path": document.path,
                "bytes": document.size,
                "sha256": document.digest,
                "bits_per_byte": bits_per_byte(bounds.mean(0).sum().item(), document.size),
                "standard_error": _standard_error(bounds, document.size),
            }
        )
    return measured


def _standard_error(bounds: Float[Tensor, "draws rows"], size: int) -> float | None:
    """In bits per byte; of a single draw nobody knows."""
    if len(bounds) < 2:
        return None
    return bits_per_byte((bounds.var(0) / len(bounds)).sum().sqrt().item(), size)


def measure_ratios(
    model: Any, tokenizer: Any, documents: list[Document], context: int, rows: int
) -> list[dict[str, float]]:
    """How many masked tokens are guessed right when a given share of a full row is masked.

    Args:
        model: The masked language model.
        tokenizer: Its tokenizer.
        documents: Where the rows are from, evenly spaced over all that are full.
        context: Length of the rows.
        rows: How many to read.
    """
    tokens, real = document_rows(
        [encode_document(tokenizer, document.text) for document in documents],
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
        context,
    )
    full = tokens[real.all(1)] if real.all(1).any() else tokens[:1, : int(real[0].sum())]
    chosen = full[torch.linspace(0, len(full) - 1, min(rows, len(full))).long()]
    can = torch.ones_like(chosen, dtype=torch.bool)
    can[:, 0] = False
    found = []
    for ratio in RATIOS:
        times = torch.full((len(chosen),), ratio, dtype=torch.float64)
        masked = choose_masked(can, times, _generator_of(f"ratio {ratio}"))
        nats, right = 0.0, 0.0
        for first in range(0, len(chosen), ROWS):
            part = slice(first, first + ROWS)
            sums = masked_nats(model, chosen[part], masked[part], tokenizer.mask_token_id)
            nats, right = nats + float(sums[0].sum()), right + float(sums[1].sum())
        count = int(masked.sum())
        found.append(
            {
                "masked": ratio,
                "rows": len(chosen),
                "accuracy": right / count,
                "nats_per_masked_token": nats / count,
            }
        )
    return found


def _generator_of(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def write_sample(model: Any, tokenizer: Any, tokens: int, seed: int) -> str:
    """Let the model go on from a prompt: one token a step, blocks of 32, temperature 0.7."""
    prompt: Int[Tensor, "batch prompt"] = tokenizer(PROMPT, return_tensors="pt").input_ids
    written = sample_masked_text(
        model,
        prompt,
        new_tokens=tokens,
        mask_token=tokenizer.mask_token_id,
        block_length=32,
        temperature=0.7,
        seed=seed,
        banned_tokens=[tokenizer.bos_token_id, tokenizer.pad_token_id],
    )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def groups_of(measured: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All files together, then what is left without the tables of ``encodings/``."""
    groups = {"all": measured}
    groups["without_encodings"] = [f for f in measured if not f["path"].startswith(TABLES)]
    return {
        name: {
            "bytes": sum(file["bytes"] for file in files),
            "bits_per_byte": average(files),
            "standard_error": None
            if any(file["standard_error"] is None for file in files)
            else math.sqrt(sum((file["standard_error"] * file["bytes"]) ** 2 for file in files))
            / sum(file["bytes"] for file in files),
        }
        for name, files in groups.items()
        if files
    }


def llama_on_the_same(measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The figures of llama-stdlib's card, if it was measured on the very same files."""
    card = json.loads((llama_stdlib.folder() / "card.json").read_text(encoding="utf-8"))
    theirs = {file["path"]: file["sha256"] for file in card["held_out"]["files"]}
    if theirs != {file["path"]: file["sha256"] for file in measured}:
        return {}
    return {name: card["held_out"][name] for name in groups_of(measured)}


def export(
    out_dir: str | Path,
    folder: str | Path,
    *,
    root: Path | None = None,
    draws: int = 2,
    ratio_rows: int = 64,
) -> dict[str, Any]:
    """Store a run's weights in float16, measure them as stored and write the data card.

    Args:
        out_dir: Where :func:`~attending.zoo.recipes.mdlm_stdlib.train` kept its checkpoint.
        folder: Receives weights, configuration, ``card.json`` and ``README.md``; the tokenizer is
            that of ``llama-stdlib`` and is not stored again.
        root: The folder of ``.py`` files given to ``train``, if one was.
        draws: How often each held-out row is masked and read for the bound.
        ratio_rows: Rows read for the accuracy at each ratio.

    Returns:
        The data card.
    """
    checkpoint, target = Path(out_dir) / CHECKPOINT, Path(folder)
    if not checkpoint.exists():
        raise ValueError(
            f"expected a training run with {CHECKPOINT}, got {out_dir}, which has none; train first"
        )
    state = read_state(checkpoint)
    recipe = MdlmStdlibRecipe(**state["recipe"])
    tokenizer = mdlm_stdlib.load_tokenizer()
    training, held_out = split(read_documents(root), recipe.held_out_per_mille)
    stream = torch.cat([encode_document(tokenizer, document.text) for document in training])
    data = PackedTokens(stream, tokenizer.bos_token_id, recipe.seed)
    # Another standard library may have trained on what this one holds out.
    corpus = {"fingerprint": data.fingerprint, "training_tokens": len(stream)}
    check_same("corpus", state["corpus"], corpus, checkpoint)
    check_same("start", state["start"], start_of(recipe), checkpoint)
    trained = build_model(recipe, tokenizer)
    load_checkpoint(checkpoint, trained)
    write_weights(trained, None, target, {"finished": False})

    model: Any = mdlm_stdlib.load(path=target).model
    measured = measure(model, tokenizer, held_out, recipe.context, draws)
    results = groups_of(measured)
    tokens_seen = state["step"] * recipe.rows_per_step * (recipe.context - 1)
    card = {
        "name": "mdlm-stdlib",
        "finished": state["step"] == recipe.steps,
        "class": "transformers.EuroBertForMaskedLM",
        "parameters": model.num_parameters(),
        "stored_dtype": "float16",
        "data": {
            "what": "Source and documentation text (.py files) of the Python standard library",
            "license": LICENSE,
            "training_files": len(training),
            "training_bytes": sum(document.size for document in training),
            **state["corpus"],
        },
        "split": f"by file: held out if sha256(path) mod 1000 < {recipe.held_out_per_mille}",
        "start": state["start"],
        "recipe": state["recipe"],
        "steps": state["step"],
        "tokens_seen": tokens_seen,
        "epochs": tokens_seen / len(stream),
        "machine": state["machine"],
        "seconds": state["seconds"],
        "curve": state["curve"],
        "headline": f"at most {results['all']['bits_per_byte']:.3f} held-out bits per byte",
        "held_out": {**results, "draws": draws, "files": measured},
        "held_out_of_llama_stdlib": llama_on_the_same(measured),
        "masked_tokens": measure_ratios(model, tokenizer, held_out, recipe.context, ratio_rows),
        "sample": {
            "prompt": PROMPT,
            "text": write_sample(model, tokenizer, min(96, recipe.context // 4), recipe.seed),
        },
        "limits": list(LIMITS),
    }
    write_weights(trained, None, target, card)
    (target / "README.md").write_text(readme(card), encoding="utf-8")
    return card


def _spread(error: float | None) -> str:
    return "" if error is None else f" ± {error:.3f}"


def readme(card: dict[str, Any]) -> str:
    """The data card for people, written from the card for programs."""
    data, held_out, machine = card["data"], card["held_out"], card["machine"]
    groups = [group for group in ("all", "without_encodings") if group in held_out]
    table = (
        "| | " + " | ".join(group.replace("_", " ") for group in groups) + " |\n|---|"
        f"{'---|' * len(groups)}\n| **this model, at most** | "
        + " | ".join(
            f"{held_out[group]['bits_per_byte']:.3f}{_spread(held_out[group]['standard_error'])}"
            for group in groups
        )
        + " |"
    )
    rivals = card["held_out_of_llama_stdlib"]
    labels = {"bits_per_byte": "llama-stdlib, exactly", "bz2": "bz2, each file alone"}
    for row, label in labels.items() if rivals else ():
        table += f"\n| {label} | " + " | ".join(f"{rivals[g][row]:.3f}" for g in groups) + " |"
    ratios = "\n".join(
        f"| {found['masked']:.0%} | {found['accuracy']:.1%} | "
        f"{found['nats_per_masked_token']:.2f} |"
        for found in card["masked_tokens"]
    )
    points = "\n".join(
        f"| {p['step']} | {p['training_loss']:.3f} | {p['held_out_starts_bits_per_byte']:.3f} |"
        for p in card["curve"]
    )
    limits = "\n".join(f"- {limit}" for limit in card["limits"])
    start = card["start"]["from"]
    unfinished = (
        ""
        if card["finished"]
        else f"\nThe run was stopped after {card['steps']} of {card['recipe']['steps']} steps, its "
        "learning rate not yet down to zero; this is its last checkpoint.\n"
    )
    return f"""# {card["name"]}

A `{card["class"]}` of {card["parameters"]:,} parameters, a masked diffusion language model trained
by `attending.zoo.recipes.mdlm_stdlib`. Stored in {card["stored_dtype"]}, meant to be loaded in
float32: `attending.zoo.load("{card["name"]}")`. The tokenizer is that of `llama-stdlib` and a mask
token. This page is written by the recipe's export.

## Data

{data["what"]}, Python {machine["python"]}, without test suites and installed packages.
{data["training_files"]} files, {data["training_bytes"]:,} bytes,
{data["training_tokens"]:,} tokens.
Licence of the text: {data["license"]}.

Split {card["split"]}, as for `llama-stdlib`, so neither has seen the files that are held out.
These are {len(held_out["files"])} files, {held_out["all"]["bytes"]:,} bytes.
They are listed in `card.json`, each with its hash and its bits per byte.

## Training

The weights start from {start}. Then {card["steps"]} steps, {card["tokens_seen"]:,} tokens
({card["epochs"]:.2f} epochs) in rows of {card["recipe"]["context"]}, of which every step masks
shares that are spread evenly over 0 to 1; a masked token weighs one over the share.
{card["seconds"]:.0f} seconds on {machine["processor"]}, {machine["threads"]} of
{machine["logical_processors"]} threads, beside other work, PyTorch {machine["torch"]}.
All settings are in `card.json`.
{unfinished}
Training loss: the bound in nats per token, averaged since the measurement before. Bits per byte:
the bound on the first characters of each held-out file, one mask each, noisy but always the same.

| step | training loss | bits per byte |
|---|---|---|
{points}

## How good it is

The bound of the diffusion on the bits per byte of the held-out files, lower is better: every row
of {card["recipe"]["context"]} tokens by itself; sets of masks for each row: {held_out["draws"]}.
After ±, if given, one standard error of the masks. Measured with the float16 weights of this folder
loaded in float32.

{table}

How many masked tokens it guesses right in {card["masked_tokens"][0]["rows"]} held-out rows:

| masked | right | nats per masked token |
|---|---|---|
{ratios}

A sample (one token a step, blocks of 32, temperature 0.7) that begins with the prompt

```python
{card["sample"]["prompt"]}
```

and reads in full

```python
{card["sample"]["text"]}
```

## Limits

{limits}
"""
