"""Training-free edits of a running model: one file per method.

An intervention is a dataclass of its hyper-parameters. Called with a model it is a context manager:
within the block the model's attention is changed, afterwards the model is bit for bit what it was.

    with HierarchicalAttention(tree=trees, layers=(-1, -3))(model):
        model(**batch)

Its work is a handler of `attending.taps`, so that interventions nest like functions.

- `attending.interventions.hierarchical_attention`: attention tied along a tree, in chosen layers of
  a pretrained encoder.
"""
