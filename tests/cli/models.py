"""Small models of real classes, with random weights, saved to folders as users have them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

WORDS = """the keeper counted ships every night and wrote a number into his ledger because an empty
line could also mean that he had slept when it was full he sent it to the harbour where clerks
added up all pages found busy weeks of that year and asked for one more lamp"""
VOCABULARY = 120


def tokenizer(dress: bool = True, padding: bool = True, **settings: Any) -> PreTrainedTokenizerFast:
    """A word tokenizer; `dress` puts <s> and </s> around a text."""
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    inner.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=special))
    if dress:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if padding:
        names["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names, **settings)


def _save(model: Any, folder: Path, tokens: PreTrainedTokenizerFast | None) -> Path:
    model.eval().save_pretrained(folder)
    if tokens is not None:
        tokens.save_pretrained(folder)
    return folder


_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(folder: Path, context: int = 64, **of_tokenizer: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**_SMALL, num_key_value_heads=2, max_position_embeddings=context)
    return _save(LlamaForCausalLM(config), folder, tokenizer(dress=False, **of_tokenizer))


def bert(folder: Path, kind: str = "BertModel") -> Path:
    torch.manual_seed(0)
    classes = {
        "BertModel": BertModel,
        "BertForMaskedLM": BertForMaskedLM,
        "BertForSequenceClassification": BertForSequenceClassification,
    }
    config = BertConfig(**_SMALL, max_position_embeddings=48)
    return _save(classes[kind](config), folder, tokenizer())


def roberta(folder: Path) -> Path:
    torch.manual_seed(0)
    small = _SMALL | {"pad_token_id": 1, "bos_token_id": 0}
    config = RobertaConfig(**small, max_position_embeddings=42, type_vocab_size=1)
    return _save(RobertaModel(config), folder, tokenizer())


def bart(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    return _save(BartForConditionalGeneration(config), folder, tokenizer())


def t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return _save(
        T5ForConditionalGeneration(config), folder, tokenizer(dress=False, model_max_length=64)
    )


def vit(folder: Path) -> Path:
    small = {k: v for k, v in _SMALL.items() if not k.endswith("token_id") and k != "vocab_size"}
    return _save(ViTModel(ViTConfig(**small, image_size=16, patch_size=8)), folder, None)


def clip(folder: Path) -> Path:
    text = {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}
    image = {k: v for k, v in text.items() if not k.endswith("token_id") and k != "vocab_size"}
    config = CLIPConfig(text_config=text, vision_config=image | {"image_size": 16, "patch_size": 8})
    return _save(CLIPModel(config), folder, tokenizer())


def deberta(folder: Path) -> Path:
    return _save(DebertaV2Model(DebertaV2Config(**_SMALL)), folder, tokenizer())


def pickled(folder: Path) -> Path:
    """A Llama whose weights are a pickle, as old checkpoints are."""
    llama(folder)
    weights = LlamaForCausalLM.from_pretrained(folder).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder
