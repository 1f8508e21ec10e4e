"""Evaluation: a checkpoint and photos in; panoptic maps, PQ and a report out.

In: a run, a checkpoint or an export, and a split or any photos. Out: COCO panoptic PNGs and JSON,
scores, one HTML page. Read first: `predict.py`, then `decoder/`, `metric/` and `split.py`.
"""
