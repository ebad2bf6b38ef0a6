"""The algebra: what softmax attention is, and what can be known of it. Knows only torch."""
