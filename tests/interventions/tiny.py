"""Small causal models with random weights that look sharply enough to have sinks."""

import torch
import transformers
from torch import nn


def make_causal(
    kind: str = "Llama", layers: int = 3, heads: int = 4, **changes: object
) -> nn.Module:
    """A causal language model of transformers with 2 key heads, on SDPA, in evaluation mode."""
    settings = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{kind}Config")(**(settings | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(6.0)
    return model
