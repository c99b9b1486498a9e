"""The network, its streamed head, draws from it, the training objective, and the optimizer."""
