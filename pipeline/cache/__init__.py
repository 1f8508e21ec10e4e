"""The format of a cache: writes, reads and checks samples, shards, sidecars and the index.

In: a `Sample` for each image. Out: tars with sidecars and `index.json`, and the samples read back.
FORMAT.md describes the files. Read first: `sample.py`.
"""
