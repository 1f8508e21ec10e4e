"""The Dask stage: plans shards, renders each as one job, and writes the index last.

In: a `CocoPanoptic` dataset and a `RenderConfig`. Out: a cache that a killed run continues to the
same bytes. Read first: `image.py` (one image), then `driver.py` (the whole split).
"""
