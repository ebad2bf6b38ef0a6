"""One block of visual token pruning: the hooks on a LLaVA, and what they count."""

import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attending.interventions._image_features import Images, KeptImage, watched_features
from attending.interventions._image_selectors import IN_LANGUAGE_MODEL, chooser, kept_of, needs_of
from attending.interventions._language_pruning import LanguagePruning
from attending.interventions._pruned_inputs import (
    Shortened,
    cache_in,
    images_in,
    placeholders,
    shorten,
    untouched,
)
from attending.interventions._pruning_run import PruningRun, llava_model
from attending.interventions._visual_sequences import cache_of
from attending.interventions.vision_language import language_layers
from attending.sparse.language_tokens import sparse_vlm_schedule
from attending.taps import tap
from attending.taps.where import arguments_of

if TYPE_CHECKING:
    from attending.interventions.visual_token_pruning import VisualTokenPruning


class PruningBlock:
    """Hooks on a model, for one block."""

    def __init__(self, method: "VisualTokenPruning", model: nn.Module) -> None:
        self.method = method
        self.model = model
        self.inner = llava_model(model)
        self.run = PruningRun(f"VisualTokenPruning({method.selector!r})")
        self._thread = threading.get_ident()
        self._images: Images | None = None
        self._shortened = False  # by the hook of the module around the LlavaModel
        self._pending: Shortened | None = None
        self._sequences: weakref.WeakKeyDictionary[Any, Shortened] = weakref.WeakKeyDictionary()

    def open(self, stack: ExitStack) -> PruningRun:
        """Put the hooks on, and on the stack what takes them off."""
        if self.method.selector in IN_LANGUAGE_MODEL:
            self._hook_language_model(stack)
        else:
            self._hook_inputs(stack)
        return self.run

    def _is_mine(self) -> bool:
        return threading.get_ident() == self._thread

    def _embedding(self) -> Tensor:
        ids = torch.tensor(self.inner.config.image_token_id, device=self.inner.device)
        found: Tensor = self.inner.get_input_embeddings()(ids)
        return found

    # Before the language model.

    def _hook_inputs(self, stack: ExitStack) -> None:
        from transformers import LlavaForConditionalGeneration

        method = self.method
        choose = chooser(
            method.selector,
            method.keep,
            erank_avg=method.erank_avg,
            tau_max=method.tau_max,
            tau=method.tau,
            attention_share=method.attention_share,
            seed=method.seed,
        )
        needs = needs_of(method.selector)
        self._images = stack.enter_context(
            watched_features(self.inner, needs, choose, self._is_mine)
        )
        around = [
            module
            for module in self.model.modules()
            if isinstance(module, LlavaForConditionalGeneration)
        ]
        for module in (*around, self.inner):
            # First of all, so that other hooks see what the model gets.
            before = module.register_forward_pre_hook(self._shorten, prepend=True, with_kwargs=True)
            stack.callback(before.remove)
        for module in around:
            after = module.register_forward_hook(self._forget, always_call=True)
            stack.callback(after.remove)
        after = self.inner.register_forward_hook(self._remember, with_kwargs=True)
        stack.callback(after.remove)

    def _shorten(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._is_mine():
            return None
        if module is self.inner and self._shortened:
            return None
        self._shortened = module is not self.inner
        self._pending = None
        given = arguments_of(module, args, kwargs)
        kept = self._encode(given)
        cache = cache_of(given)
        before = self._sequences.get(cache) if cache is not None else None
        cached = int(getattr(cache, "get_seq_length", lambda: 0)())
        if not kept and before is None:
            if not cached:
                self.run.left(None, "there was no image")
            return None
        image = placeholders(given, self.inner.config.image_token_id, self._embedding)
        drop = self._dropped(image, kept)
        if before is None and not bool(drop.any()):
            self.run.pruned(int(image.sum()), int(image.sum()))
            return (), given
        if before is not None:
            before = before.cut(cached)
        elif cached:
            before = untouched(len(drop), cached, drop.device)
        if isinstance(given.get("logits_to_keep"), Tensor):
            raise ValueError(
                "logits_to_keep: expected a number, as places in the prompt change when tokens are "
                "pruned, got a tensor of places."
            )
        pad = self.inner.config.text_config.pad_token_id
        given, self._pending = shorten(
            given, drop, before, positions=self.method.positions, filler=pad or 0
        )
        if kept:
            self.run.kept.extend(one.index for one in kept)
            count = int(image.sum())
            self.run.pruned(count, count - int(drop.sum()))
        return (), given

    def _encode(self, given: dict[str, Any]) -> list[KeptImage]:
        """Replaces pixels, or whole features, by the features that are kept."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        assert self._images is not None
        if not images_in(given):
            return []
        encoded = dict(given.get("mm_encoder_outputs") or {})
        if encoded.get("image") is None:
            settings = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
            encoded["image"] = self.inner.get_image_features(
                pixel_values=given.pop("pixel_values"),
                return_dict=True,
                **{name: given[name] for name in settings if given.get(name) is not None},
            )
        output = encoded["image"]
        kept = [self._images[features] for features in output.pooler_output]
        encoded["image"] = BaseModelOutputWithPooling(
            **{**output, "pooler_output": [one.tokens for one in kept]}
        )
        given["mm_encoder_outputs"] = encoded
        return kept

    def _dropped(self, image: Tensor, kept: list[KeptImage]) -> Tensor:
        """Which of the new tokens are placeholders of image tokens that are not kept."""
        if not kept:  # what is generated may be any token
            return torch.zeros_like(image)
        count, wanted = int(image.sum()), sum(one.before for one in kept)
        if count != wanted:
            raise ValueError(
                f"input_ids: expected {wanted} image tokens (id "
                f"{self.inner.config.image_token_id}) for {len(kept)} images, got {count}."
            )
        flags = []
        for one in kept:
            flag = torch.ones(one.before, dtype=torch.bool, device=image.device)
            # Merged tokens are numbered anew, so which placeholders stay does not matter.
            is_chosen = bool((one.index >= 0).all() and (one.index.diff() > 0).all())
            stay = one.index if is_chosen else torch.arange(len(one.index))
            flag[stay.to(image.device)] = False
            flags.append(flag)
        return torch.zeros_like(image).masked_scatter(image, torch.cat(flags))

    def _forget(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._is_mine():
            self._shortened = False

    def _remember(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._is_mine() and self._pending is not None:
            cache = cache_in(arguments_of(module, args, kwargs), output)
            if cache is not None:
                self._sequences[cache] = self._pending
            self._pending = None

    # In the language model.

    def _hook_language_model(self, stack: ExitStack) -> None:
        method, language_model = self.method, self.inner.language_model
        layers = list(language_layers(language_model).values())

        def schedule(tokens: int) -> dict[int, int]:
            keep = kept_of(method.keep, tokens)
            if method.selector == "fastv":
                return {method.layer: keep}
            if method.schedule is not None:
                return dict(method.schedule)
            return sparse_vlm_schedule(len(layers), keep, tokens)

        pruning = LanguagePruning(
            schedule,
            len(layers),
            by_text=method.selector == "sparsevlm",
            image_token_id=self.inner.config.image_token_id,
            embedding=self._embedding,
            done=self.run.pruned,
            no_image=lambda: self.run.left(None, "there was no image"),
        )

        def mine(hook: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: hook(*args) if self._is_mine() else None

        def hook_layer(number: int, layer: nn.Module) -> None:
            def before(*args: Any) -> Any:
                return pruning.before_layer(number, *args) if self._is_mine() else None

            handle = layer.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)

        begin = self.inner.register_forward_pre_hook(mine(pruning.begin), with_kwargs=True)
        stack.callback(begin.remove)
        end = self.inner.register_forward_hook(
            mine(pruning.end), with_kwargs=True, always_call=True
        )
        stack.callback(end.remove)
        for number, layer in enumerate(layers):
            hook_layer(number, layer)
        last = layers[-1].register_forward_hook(mine(pruning.after_last))
        stack.callback(last.remove)
        stack.enter_context(tap(language_model, pruning.look))
