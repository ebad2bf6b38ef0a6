"""One look at the numbers of heads that a layer is built with."""


def check_head_counts(embed_dim: int, num_heads: int, num_kv_heads: int | None = None) -> int:
    """Raise unless the heads divide the width, and the heads of key and value those of the query.

    Returns:
        The number of heads of key and value: `num_heads` where none is given.
    """
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}."
        )
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a divisor of num_heads {num_heads}, got {kv_heads}."
        )
    return kv_heads
