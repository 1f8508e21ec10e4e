"""What people look at after an evaluation: pictures, tables, and one HTML page.

In: scores, predictions on disk and the photos. Out: overlays, a comparison sheet, `report.html`.
Read first: `panels.py`, then `page.py`.
"""
