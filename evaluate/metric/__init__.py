"""Scores: PQ to the last digit of the official evaluator, and what stands beside it.

In: true and predicted segment maps with their segments. Out: `Scores`. Imports nothing from
`decoder`. Read first: `pairs.py`, `matching.py`, `pq.py`, then `score.py`.
"""
