"""The evaluation of a whole split, which resumes after a kill at any moment.

In: a `Predictor` and a dataset. Out: a folder of predictions, scores, pictures and the report. Read
first: `evaluation.py`, then `share.py` and `../prediction_files.py`.
"""
