"""A second sequence that is told the tokens of the first: its prompt, its cache, its positions."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class SecondBranch:
    """A model on another prompt, that continues with the tokens which a first branch generates.

    What it has consumed is compared with the tokens that it is shown. If they go on from there, the
    new ones are fed to the cache; if rows changed places (beam search), so do those of the cache;
    anything else starts from the prompt again. So the cache can make it fast and never wrong.

    Attributes:
        step: how many generated tokens the last logits have seen.
        moved: whether the last call found rows in other places.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        given = dict(inputs)
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        if not isinstance(tokens, Tensor) or tokens.dim() < 2 or tokens.shape[1] == 0:
            raise ValueError(
                "negative_inputs: expected input_ids [batch, tokens] or inputs_embeds [batch, "
                f"tokens, dim], at least one token, got {sorted(given)}."
            )
        self._mask = given.pop("attention_mask", None)
        if self._mask is None:
            self._mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        if self._mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"negative_inputs: expected an attention_mask {list(tokens.shape[:2])}, got "
                f"{list(self._mask.shape)}."
            )
        if not bool(self._mask[:, -1].all()):
            raise ValueError(
                "negative_inputs: expected left padding, as tokens are appended on the right, got "
                "an attention_mask with zeros in its last column."
            )
        self.model, self.inputs = model, given
        self.batch = len(tokens)
        self._padded = not bool(self._mask.all())
        unwrap: Any = getattr(model, "get_base_model", lambda: model)  # what PEFT wraps
        self._parameters = inspect.signature(unwrap().forward).parameters
        # Models with positions of several axes (Qwen2-VL) make them from the mask themselves.
        base = getattr(unwrap(), "base_model", model)
        self._gives_positions = "position_ids" in self._parameters and not hasattr(
            base, "get_rope_index"
        )
        self._prompt: Tensor | None = None  # of the first branch
        self._written: Tensor | None = None  # generated tokens that the cache has seen
        self._logits: Tensor | None = None
        self._cache: Any = None
        self.step, self.moved = 0, False

    @torch.no_grad()
    def next_logits(self, input_ids: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows vocab"]:
        """The logits of the next token, after the tokens that the first branch generated.

        Args:
            input_ids: of the first branch, prompt and generated tokens. The first call is taken for
                the prompt. Each row of the second prompt may stand for several neighbouring rows.
        """
        new = self._generated(input_ids)
        self.step = new.shape[1]
        self.moved = False
        if self.step == 0 or not self._resume(new):
            self._begin(len(new) // self.batch)
        assert self._written is not None
        if new.shape[1] > self._written.shape[1]:
            self._feed(new)
        assert self._logits is not None
        return self._logits

    def _generated(self, input_ids: Tensor) -> Tensor:
        if len(input_ids) == 0 or len(input_ids) % self.batch:
            raise ValueError(
                f"input_ids: expected {self.batch} rows, as negative_inputs have, or a multiple of "
                f"that, got {list(input_ids.shape)}."
            )
        if self._prompt is None:
            self._prompt = input_ids[:: len(input_ids) // self.batch].clone()
        length = self._prompt.shape[1]
        prompt = self._prompt.repeat_interleave(len(input_ids) // self.batch, 0)
        if not torch.equal(input_ids[:, :length], prompt):
            raise ValueError(
                "input_ids: expected the prompt of the first call, to which negative_inputs "
                "belong, and generated tokens, got another prompt. Make a new processor for it."
            )
        return input_ids[:, length:].to(self._mask.device)

    def _resume(self, new: Tensor) -> bool:
        """Bring the cache to rows that are prefixes of the new ones; False if it has none."""
        written = self._written
        if written is None or len(written) != len(new) or written.shape[1] > new.shape[1]:
            return False
        head = new[:, : written.shape[1]]
        if torch.equal(head, written):
            return True
        if self._cache is None:
            return False
        sample = torch.arange(len(new), device=new.device) // (len(new) // self.batch)
        same = (head[:, None] == written[None]).all(-1) & (sample[:, None] == sample[None])
        if not bool(same.any(1).all()):
            return False
        order = same.int().argmax(1)
        self._cache.reorder_cache(order)
        assert self._logits is not None
        self._written, self._logits = head, self._logits[order]
        self.moved = True
        return True

    def _begin(self, times: int) -> None:
        """Run the prompt, once for each sample, and share the cache among its rows."""
        self._cache = None
        self._run(self.inputs, self._mask)
        assert self._logits is not None
        if times > 1:
            self._logits = self._logits.repeat_interleave(times, 0)
            if self._cache is not None:
                self._cache.batch_repeat_interleave(times)
        self._written = self._mask.new_zeros((self.batch * times, 0))

    def _feed(self, new: Tensor) -> None:
        assert self._written is not None
        if self._cache is None:
            raise ValueError(
                f"model: expected one that returns a cache, got {type(self.model).__name__}, which "
                "returned none with use_cache=True."
            )
        times = len(new) // self.batch
        mask = self._mask.repeat_interleave(times, 0)
        mask = torch.cat([mask, mask.new_ones(new.shape)], 1)
        fresh = new[:, self._written.shape[1] :]
        self._run({"input_ids": fresh}, mask)
        self._written = new

    def _run(self, inputs: Mapping[str, Any], mask: Tensor) -> None:
        arguments = dict(inputs)
        if self._padded:
            arguments["attention_mask"] = mask
            if self._gives_positions:
                tokens = arguments.get("input_ids", arguments.get("inputs_embeds"))
                assert isinstance(tokens, Tensor)
                positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
                arguments["position_ids"] = positions[:, -tokens.shape[1] :]
        if "logits_to_keep" in self._parameters:
            arguments["logits_to_keep"] = 1
        outputs = self.model(**arguments, cache=self._cache, use_cache=True, return_dict=True)
        self._cache = outputs.get("cache")
        self._logits = outputs.logits[:, -1]
