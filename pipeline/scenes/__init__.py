"""Synthetic scenes in COCO's panoptic format, for the demo, the tests and the benchmarks.

In: a seed and a number of images. Out: photos, panoptic PNGs and annotations. Read first:
`scene.py`.
"""
