"""Which head of key and value each query head attends with, as data.

In grouped-query attention it is `h // (heads / kv_heads)`, and fused kernels do that by themselves.
Differential attention has two kinds of query heads, each with such a map of its own, and a third
map from signal heads to the noise heads that are subtracted from them. Layers, converters and the
growth of checkpoints all read their indices from here, so that a checkpoint cannot be cut in two
ways.
"""

from dataclasses import dataclass


def grouped_head_map(num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """The head of key and value of each query head, in grouped-query attention.

        grouped_head_map(6, 2)          # (0, 0, 0, 1, 1, 1)

    Raises:
        ValueError: if the one is not a multiple of the other.
    """
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads: expected a multiple of num_kv_heads {num_kv_heads}, both at least 1, got "
            f"{num_heads}."
        )
    return tuple(head // (num_heads // num_kv_heads) for head in range(num_heads))


@dataclass(frozen=True)
class DifferentialHeads:
    """The layout of the heads of (grouped) differential attention.

    Query heads come in `num_noise` groups of `ratio` signal heads and then one noise head. Key
    heads come in pairs, signal and noise; each pair has one value. This is the layout of the
    official code of the Differential Transformer (ratio 1) and of Motif's models.

    Attributes:
        num_signal: signal heads, a multiple of `num_noise`; as many outputs.
        num_noise: noise heads, a multiple of `num_pairs`.
        num_pairs: pairs of keys, and values.

    Raises:
        ValueError: for numbers that do not divide.
    """

    num_signal: int
    num_noise: int
    num_pairs: int

    def __post_init__(self) -> None:
        if self.num_noise < 1 or self.num_signal < 1 or self.num_signal % self.num_noise:
            raise ValueError(
                "num_signal_heads: expected a multiple of num_noise_heads, both at least 1, since "
                f"each noise head serves equally many signal heads; got {self.num_signal} and "
                f"{self.num_noise}."
            )
        if self.num_pairs < 1 or self.num_noise % self.num_pairs:
            raise ValueError(
                f"num_kv_pairs: expected a divisor of num_noise_heads {self.num_noise}, at least "
                f"1, got {self.num_pairs}."
            )

    @property
    def ratio(self) -> int:
        """Signal heads for each noise head."""
        return self.num_signal // self.num_noise

    @property
    def num_query(self) -> int:
        """Query heads in all."""
        return self.num_signal + self.num_noise

    @property
    def signal(self) -> tuple[int, ...]:
        """Which query heads are signal heads, in order."""
        return tuple(h for h in range(self.num_query) if h % (self.ratio + 1) != self.ratio)

    @property
    def noise(self) -> tuple[int, ...]:
        """Which query heads are noise heads, in order."""
        return tuple(h for h in range(self.num_query) if h % (self.ratio + 1) == self.ratio)

    @property
    def pair_of_signal(self) -> tuple[int, ...]:
        """The pair whose signal key, and whose value, each signal head attends with."""
        return grouped_head_map(self.num_signal, self.num_pairs)

    @property
    def pair_of_noise(self) -> tuple[int, ...]:
        """The pair whose noise key, and whose value, each noise head attends with."""
        return grouped_head_map(self.num_noise, self.num_pairs)

    @property
    def noise_of_signal(self) -> tuple[int, ...]:
        """The noise head that is subtracted from each signal head."""
        return grouped_head_map(self.num_signal, self.num_noise)

    def grown_from(self, factor: int) -> tuple[int, ...]:
        """Which query head of these each one is a copy of, when signal heads are grown.

        Each signal head gets `factor` copies beside each other in its group. So every map above is
        that of the original: a tiled list of copies would give them other keys and noise heads.
        """
        copies = []
        for head in range(self.num_query):
            is_noise = head % (self.ratio + 1) == self.ratio
            copies += [head] * (1 if is_noise else factor)
        return tuple(copies)
