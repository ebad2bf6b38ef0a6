"""How a diagnosis is made: inputs in, statistics collected, findings drawn from them."""
