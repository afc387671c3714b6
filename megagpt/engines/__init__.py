"""Engines: where weights, gradients and optimizer state live."""
