"""From the two heads of the network to panoptic maps.

In: codes (channels, S, S) and logits (classes, S, S) of a batch. Out: one `PanopticMap` an image,
at its native size. Imports nothing from `metric`. Read first: `decode_images` in `decode.py`.
"""
