"""Checkpoint and pictures -> panoptic maps -> PQ and reports."""
