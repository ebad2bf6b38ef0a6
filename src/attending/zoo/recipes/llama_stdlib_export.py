"""Turns a training run of ``llama-stdlib`` into the folder that is shipped, with its data card.

Every figure of the card is measured here, on the weights as they are stored; none is written by
hand.
"""

from pathlib import Path
from typing import Any

import torch

from attending.zoo.loading import load_folder
from attending.zoo.recipes.bits_per_byte import bits_per_byte, compression_baselines, total_nats
from attending.zoo.recipes.byte_bpe import encode_document
from attending.zoo.recipes.checkpoint import load_checkpoint, read_state
from attending.zoo.recipes.stdlib_text import LICENSE, Document, read_documents, split
from attending.zoo.recipes.weights_folder import write_weights

TABLES = "encodings/"
PROMPT = 'class Stack:\n    """A list of which only the last item is seen."""\n\n    def '
LIMITS = (
    "Writes text that looks like Python, not programs that work.",
    "Knows only the standard library of one Python version; no other code and hardly any prose.",
    "Reads at most the context of the recipe, in tokens.",
    "Every training row starts with the bos token, mostly in mid-file; start inputs with bos, as "
    "the tokenizer does by itself.",
    "The split is by file, but the library repeats itself: files of encodings/ are nearly copies "
    "of each other, so figures without them are given too, and xz that may copy from the training "
    "text as a rival that profits from repetition even more than a small model can.",
    "Meant for trying attention methods on a real model in seconds, not for use in products.",
)


def measure(
    model: Any, tokenizer: Any, documents: list[Document], context: int
) -> list[dict[str, Any]]:
    """Bits per byte of each document, every token but the first few seeing half a context."""
    measured = []
    for document in documents:
        nats = total_nats(
            model,
            encode_document(tokenizer, document.text),
            bos=tokenizer.bos_token_id,
            context=context,
            stride=context // 2,
        )
        measured.append(
            {
                "path": document.path,
                "bytes": document.size,
                "sha256": document.digest,
                "bits_per_byte": bits_per_byte(nats, document.size),
            }
        )
    return measured


def average(measured: list[dict[str, Any]]) -> float:
    """Bits per byte of several files taken together: long files weigh more."""
    size = sum(file["bytes"] for file in measured)
    return float(sum(file["bits_per_byte"] * file["bytes"] for file in measured) / size)


def write_sample(model: Any, tokenizer: Any, prompt: str, tokens: int, seed: int) -> str:
    """Let the model go on from a prompt, with ordinary sampling and a fixed seed."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=0, top_p=0.95
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def export(out_dir: str | Path, folder: str | Path, *, root: Path | None = None) -> dict[str, Any]:
    """Store a run's weights in float16, measure them as stored and write the data card.

    Args:
        out_dir: Where :func:`~attending.zoo.recipes.llama_stdlib.train` kept its checkpoint.
        folder: Receives weights, configuration, tokenizer, ``card.json`` and ``README.md``.
        root: The folder of ``.py`` files given to ``train``, if one was.

    Returns:
        The data card.
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from attending.zoo.recipes.llama_stdlib import (
        LlamaStdlibRecipe,
        build_model,
        load_corpus,
    )
    from attending.zoo.recipes.training_loop import CHECKPOINT, check_same

    checkpoint, target = Path(out_dir) / CHECKPOINT, Path(folder)
    if not checkpoint.exists():
        raise ValueError(
            f"expected a training run with {CHECKPOINT}, got {out_dir}, which has none; train first"
        )
    state = read_state(checkpoint)
    recipe = LlamaStdlibRecipe(**state["recipe"])
    run_tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(Path(out_dir) / "tokenizer")
    training, held_out = split(read_documents(root), recipe.held_out_per_mille)
    _, corpus = load_corpus(run_tokenizer, training, recipe.seed)
    # Another standard library may have trained on what this one holds out.
    check_same("corpus", state["corpus"], corpus, checkpoint)
    trained = build_model(recipe, run_tokenizer)
    load_checkpoint(checkpoint, trained)
    write_weights(trained, run_tokenizer, target, {"finished": False})

    model, tokenizer = load_folder(AutoModelForCausalLM, target)
    measured = measure(model, tokenizer, held_out, recipe.context)
    texts = {document.path: document.text for document in held_out}
    training_texts = [document.text for document in training]
    # Everything, then what is left without the tables of encodings/, which copy each other.
    groups = {"all": measured}
    groups["without_encodings"] = [f for f in measured if not f["path"].startswith(TABLES)]
    results: dict[str, dict[str, float]] = {
        group: {
            "bytes": sum(file["bytes"] for file in files),
            "bits_per_byte": average(files),
            **compression_baselines([texts[file["path"]] for file in files], training_texts),
        }
        for group, files in groups.items()
        if files
    }
    tokens_seen = state["step"] * recipe.tokens_per_step
    card = {
        "name": "llama-stdlib",
        "finished": state["step"] == recipe.steps,
        "class": "transformers.LlamaForCausalLM",
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
        "recipe": state["recipe"],
        "steps": state["step"],
        "tokens_seen": tokens_seen,
        "epochs": tokens_seen / state["corpus"]["training_tokens"],
        "machine": state["machine"],
        "seconds": state["seconds"],
        "tokens_per_second": tokens_seen / state["seconds"],
        "curve": state["curve"],
        "headline": f"{results['all']['bits_per_byte']:.3f} held-out bits per byte",
        "held_out": {
            **results,
            "files": measured,
        },
        "sample": {
            "prompt": PROMPT,
            "text": write_sample(model, tokenizer, PROMPT, recipe.context // 3, recipe.seed),
        },
        "limits": list(LIMITS),
    }
    write_weights(trained, run_tokenizer, target, card)
    (target / "README.md").write_text(readme(card), encoding="utf-8")
    return card


def readme(card: dict[str, Any]) -> str:
    """The data card for people, written from the card for programs."""
    data, held_out, machine = card["data"], card["held_out"], card["machine"]
    short, long = card["recipe"]["short_context"], card["recipe"]["context"]
    fraction = card["recipe"]["short_fraction"]
    groups = [group for group in ("all", "without_encodings") if group in held_out]
    rows = {
        "bits_per_byte": "**this model**",
        "bz2": "bz2, each file alone",
        "xz": "xz, each file alone",
        "xz_together": "xz, all held-out files in one stream",
        "xz_after_training_text": "xz that has read the training text first",
    }
    table = "\n".join(
        f"| {label} | " + " | ".join(f"{held_out[group][row]:.3f}" for group in groups) + " |"
        for row, label in rows.items()
    )
    heading = "| | " + " | ".join(group.replace("_", " ") for group in groups) + " |"
    curve = card["curve"]
    shown = [*curve[:: max(1, len(curve) // 7)], curve[-1]]
    if len(shown) > 1 and shown[-2] == shown[-1]:
        shown.pop()
    points = "\n".join(
        f"| {p['step']} | {p['training_loss']:.3f} | {p['held_out_starts_bits_per_byte']:.3f} |"
        for p in shown
    )
    limits = "\n".join(f"- {limit}" for limit in card["limits"])
    return f"""# {card["name"]}

A `{card["class"]}` of {card["parameters"]:,} parameters, trained from random weights by
`attending.zoo.recipes.llama_stdlib`. Stored in {card["stored_dtype"]}, meant to be loaded in
float32: `attending.zoo.load("{card["name"]}")`. This page is written by the recipe's export.

## Data

{data["what"]}, Python {machine["python"]}, without test suites and installed packages.
{data["training_files"]} files, {data["training_bytes"]:,} bytes, {data["training_tokens"]:,} tokens
of the model's own byte-level tokenizer, which was trained on the same files.
Licence of the text: {data["license"]}.

Split {card["split"]}.
That holds out {len(held_out["files"])} files, {held_out["all"]["bytes"]:,} bytes.
They are listed in `card.json`, each with its hash and its bits per byte.

## Training

{card["steps"]} steps, {card["tokens_seen"]:,} tokens ({card["epochs"]:.1f} epochs),
{card["seconds"]:.0f} seconds at {card["tokens_per_second"]:.0f} tokens per second on
{machine["processor"]}, {machine["threads"]} of {machine["logical_processors"]} threads,
PyTorch {machine["torch"]}. All settings are in `card.json`.

Training loss in nats per token, averaged since the measurement before; bits per byte of the first
characters of each held-out file. Rows grow from {short} to {long} tokens after {fraction:.0%} of
the steps; bits per byte, always measured at the longer length, fall then.
All measurements are in `card.json`.

| step | training loss | bits per byte |
|---|---|---|
{points}

## How good it is

Bits per byte of the held-out files, lower is better. The model is measured with the float16
weights of this folder loaded in float32, and pays for the end of each file as well.

{heading}
|---|{"---|" * len(groups)}
{table}

A sample (temperature 0.7, top-p 0.95) that begins with the prompt

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
