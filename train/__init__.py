"""Training: a cache in, checkpoints out.

In: a cache's index and shards. Out: a run's folder of checkpoints, metrics and pictures. Read
first: `augment.py`, `data.py`, `losses.py`, then `loop.py`, which is one visible function.
"""
