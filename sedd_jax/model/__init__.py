"""The network, its streamed head, what is drawn from it, and its optimizer."""
