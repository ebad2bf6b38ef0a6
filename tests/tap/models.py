"""Tiny, randomly initialised models of real classes, and what a tap has to see in each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Seen:
    """One call: where, which layer, cross or self, shape of the query, and of the key."""

    name: str
    layer: int | None
    is_cross: bool
    query: tuple[int, ...]
    key: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A model, a forward of it, and the calls that this forward makes, in order."""

    model: nn.Module
    forward: Callable[[], Tensor]
    expected: list[Seen]


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 20 + 3


def padding(batch: int = 2, length: int = 7) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return mask


def layers(name: str, query: tuple[int, ...], key: tuple[int, ...] | None = None) -> list[Seen]:
    """Self-attention of two layers, `name` with a {}."""
    return [Seen(name.format(i), i, False, query, key or query) for i in range(2)]


def llama_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=40, intermediate_size=48, num_key_value_heads=2, **SIZES)
    return LlamaForCausalLM(config).eval()


def llama() -> Example:
    """Grouped queries, and no mask: the model leaves sharing the keys to the function."""
    model = llama_model()
    seen = layers("model.layers.{}.self_attn", (2, 4, 7, 8), (2, 2, 7, 8))
    return Example(model, lambda: model(tokens()).logits, seen)


def llama_padded() -> Example:
    """With a mask the keys are repeated before the call."""
    model = llama_model()
    seen = layers("model.layers.{}.self_attn", (2, 4, 7, 8))
    return Example(model, lambda: model(tokens(), attention_mask=padding()).logits, seen)


def bert() -> Example:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=40, intermediate_size=48, **SIZES)).eval()
    seen = layers("encoder.layer.{}.attention.self", (2, 4, 7, 8))
    forward = lambda: model(tokens(), attention_mask=padding()).last_hidden_state  # noqa: E731
    return Example(model, forward, seen)


def gpt2() -> Example:
    """With cross-attention, as in an encoder-decoder made of a ViT and a GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    model = GPT2LMHeadModel(config).eval()
    source = torch.randn(2, 7, 32)  # as long as the text: lengths do not tell
    seen = [
        Seen(f"transformer.h.{i}.{part}", i, cross, (2, 4, 7, 8), (2, 4, 7, 8))
        for i in range(2)
        for part, cross in (("attn", False), ("crossattention", True))
    ]
    return Example(model, lambda: model(tokens(), encoder_hidden_states=source).logits, seen)


def t5_model() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def t5() -> Example:
    model = t5_model()
    seen = layers("encoder.block.{}.layer.0.SelfAttention", (2, 4, 7, 8))
    for i in range(2):
        block = f"decoder.block.{i}.layer"
        seen += [
            Seen(f"{block}.0.SelfAttention", i, False, (2, 4, 5, 8), (2, 4, 5, 8)),
            Seen(f"{block}.1.EncDecAttention", i, True, (2, 4, 5, 8), (2, 4, 7, 8)),
        ]
    forward = lambda: model(tokens(), padding(), decoder_input_ids=tokens(2, 5)).logits  # noqa: E731
    return Example(model, forward, seen)


def vit() -> Example:
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(intermediate_size=48, image_size=16, patch_size=8, **SIZES)).eval()
    images = torch.randn(2, 3, 16, 16)
    seen = layers("layers.{}.attention", (2, 4, 5, 8))
    return Example(model, lambda: model(images).last_hidden_state, seen)


def clip() -> Example:
    from transformers import CLIPConfig, CLIPModel

    text = {**SIZES, "vocab_size": 40, "intermediate_size": 48, "eos_token_id": 39}
    vision = {**SIZES, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    images = torch.randn(2, 3, 16, 16)
    seen = layers("vision_model.encoder.layers.{}.self_attn", (2, 4, 5, 8))
    seen += layers("text_model.encoder.layers.{}.self_attn", (2, 4, 7, 8))
    return Example(model, lambda: model(tokens(), images).logits_per_text, seen)


def whisper_model() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=40, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=10, max_target_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def whisper() -> Example:
    model = whisper_model()
    sound = torch.randn(2, 8, 20)
    seen = layers("model.encoder.layers.{}.self_attn", (2, 4, 10, 8))
    for i in range(2):
        layer = f"model.decoder.layers.{i}"
        seen += [
            Seen(f"{layer}.self_attn", i, False, (2, 4, 5, 8), (2, 4, 5, 8)),
            Seen(f"{layer}.encoder_attn", i, True, (2, 4, 5, 8), (2, 4, 10, 8)),
        ]
    return Example(model, lambda: model(sound, decoder_input_ids=tokens(2, 5)).logits, seen)


LANGUAGE = [llama, llama_padded, bert, gpt2, t5, vit, clip, whisper]
