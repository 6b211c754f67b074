"""Lengths that batches are padded to: few enough to compile once each, close enough to waste little."""


def round_up(length: int, limit: int) -> int:
    """The smallest bucket that holds `length` tokens, at most `limit`.

    Buckets are 32, 48, 64, 96, 128, 192, ...: padding is below a third of a row, and a run meets few lengths.
    """
    bucket = 32
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return max(min(bucket, limit), length)
