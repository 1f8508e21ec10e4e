"""The render stage: plans shards, renders each as one job, and writes the index last.

In: a `CocoPanoptic` dataset and a `RenderConfig`. Out: a cache that a killed run continues to the
same bytes. Read first: `job.py` (one image, one shard), then `driver.py` (the whole split).
"""
