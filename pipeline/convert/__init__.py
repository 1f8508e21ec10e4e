"""Other annotation formats -> a dataset in COCO's panoptic layout.

In: photos and what people annotate them with. Out: photos, panoptic PNGs and their annotation file,
which `preprocess` and `evaluate` read. A module a format. Read first: `source.py`.
"""
