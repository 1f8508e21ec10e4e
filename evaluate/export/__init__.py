"""A trained model as files for others.

In: a checkpoint. Out: a folder that `Predictor` loads, and `model.onnx`. Read first: `files.py`.
"""
