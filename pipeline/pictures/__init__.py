"""Building blocks for pictures of samples and results: colours, text, sheets.

In: maps of segments, centroids and weights. Out: (H, W, 3) uint8 RGB arrays. Read first:
`colours.py`.
"""
