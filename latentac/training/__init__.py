"""How a model learns: value pretraining, the only training loop, and the critic's own updates."""
