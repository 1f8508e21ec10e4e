"""The offline target cache: annotated images in, shards of samples with their targets out.

In: a folder in COCO's panoptic layout (photos, annotations, panoptic PNGs). Out: a cache of tars
and sidecars with an `index.json` (FORMAT.md). Free of torch, so that Dask workers start fast.
Read first: `coco.py`, `targets.py`, `cache/sample.py`, `render/job.py`, `render/driver.py`.
"""
