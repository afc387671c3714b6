"""Sizes of the head's chunks, which a plan needs without PyTorch."""

# Tokens whose logits exist at a time: enough that the products run at full rate. A GPU reads and writes the weight's
# whole gradient for each chunk (309 MB at width 768), and a product of 1,024 rows has too few tiles for its processors.
CHUNK = {"cpu": 1024, "cuda": 8192}
# Rows of a chunk in one softmax that is not compiled. On a CPU, 16 x 50,304 in fp32 are 3 MB, which stay in cache. On a
# GPU, 1,024 rows fill it, and take 206 MB.
SOFTMAX_ROWS = {"cpu": 16, "cuda": 1024}


def chunk_rows(tokens: int, limit: int) -> int:
    """Rows of a chunk, at most `limit`: all chunks are alike if few enough make that possible, because compiled code
    and a GPU's choice of kernels depend on the shape."""
    fewest = max(1, -(-tokens // limit))
    count = next((n for n in range(fewest, 2 * fewest) if tokens % n == 0), fewest)
    return -(-tokens // count)
