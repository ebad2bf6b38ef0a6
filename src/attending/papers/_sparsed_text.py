"""SparseD while `mdlm-stdlib` fills gaps in held-out source code.

A row is real text: a prompt, and an answer of which half the tokens are masked, since the model
fills gaps well and writes poorly. Besides what `_sparsed_trajectory` measures, each method fills
the gaps freely with `sample_masked_text`, and we count how many tokens are those that dense
attention chooses.
"""

import time
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from attending import zoo
from attending.core.block_plan import BlockPlan
from attending.diffusion import sample_masked_text
from attending.interventions.block_sparse import BlockSparse
from attending.papers._sparsed_trajectory import Setup, compare
from attending.taps import AttentionCall
from attending.taps.denoising import Moment
from attending.zoo.recipes.stdlib_text import read_documents, split

HELD_OUT_PER_MILLE = 40  # as in the recipe of the model


def measure(seed: int, setup: Setup, rows: int) -> dict[str, float]:
    """What `compare` says, and:

    - `agreement_*`: share of the gaps that are filled freely as dense attention fills them.
    - `seconds_ratio`: processor time of that with SparseD over that with dense attention. At the
      length of this model a plan runs as a mask, so nothing is saved.
    """
    mdlm = zoo.load("mdlm-stdlib")
    mask = int(mdlm.tokenizer.mask_token_id)
    text, masked = _rows(seed, mdlm, setup, rows)
    numbers, kept = compare(mdlm.model, text, masked, setup, mask)
    return numbers | _fill_freely(mdlm.model, text.masked_fill(masked, mask), setup, mask, kept)


def _rows(seed: int, mdlm: Any, setup: Setup, count: int) -> tuple[Tensor, Tensor]:
    """Stretches of held-out files after a bos, each of another file while there are enough.

    And which tokens of their answers are gaps. Files of encodings are tables that repeat each
    other, and are left out.
    """
    _, held_out = split(read_documents(), HELD_OUT_PER_MILLE)
    documents = [one for one in held_out if not one.path.startswith("encodings/")]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    bos, rows = mdlm.model.config.bos_token_id, []
    for place in cycle(order):
        text = documents[place].text
        ids = mdlm.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= setup.length:
            start = int(torch.randint(len(ids) - setup.length + 2, (), generator=generator))
            rows.append(torch.tensor([bos, *ids[start : start + setup.length - 1]]))
        if len(rows) == count:
            break
    gaps = torch.rand(count, setup.answer, generator=generator).argsort(-1)[:, : setup.gaps]
    masked = torch.zeros(count, setup.length, dtype=torch.bool)
    return torch.stack(rows), masked.scatter(1, setup.prompt + gaps, True)


def _fill_freely(
    model: Any, canvas: Tensor, setup: Setup, mask: int, kept: int
) -> dict[str, float]:
    def fill(on_step: Any = None) -> tuple[Tensor, float]:
        start = time.process_time()
        tokens = sample_masked_text(
            model, canvas, new_tokens=0, mask_token=mask, steps=setup.steps, on_step=on_step
        )
        return tokens[canvas == mask], time.process_time() - start

    expected, dense_seconds = fill()
    with setup.sparsed()(model) as run:
        ours, seconds = fill(run.on_step)
    plan = setup.window(kept)

    def late(call: AttentionCall, moment: Moment) -> BlockPlan | None:
        return plan if moment.step in setup.late else None

    with BlockSparse(late, steps=setup.steps)(model):
        near, _ = fill()
    return {
        "agreement_sparsed": float((ours == expected).double().mean()),
        "agreement_window": float((near == expected).double().mean()),
        "seconds_ratio": seconds / dense_seconds,
    }
