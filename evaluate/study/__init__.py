"""Studies of the decoder: perfect and corrupted heads, other decoders, benchmarks.

In: ground truth, or saved heads. Out: tables of PQ and time. Read first: `ceiling.py`.
"""
