"""The format of a cache: samples, shards, sidecars and the index, written, read and checked.

In: a `Sample` an image. Out: tars with sidecars and `index.json`, and the same samples again.
FORMAT.md describes the files. Read first: `sample.py`.
"""
