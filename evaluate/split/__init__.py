"""A whole split: predict every image, note it, score it, and go on after a kill.

In: a `Predictor` and a dataset. Out: a folder of predictions, scores and the report. Read first:
`evaluation.py`.
"""
