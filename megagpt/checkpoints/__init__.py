"""One checkpoint for every engine and world size: written, verified, found, read."""
