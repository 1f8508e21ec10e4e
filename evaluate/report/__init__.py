"""What people look at after an evaluation: pictures, tables and one HTML page.

In: scores, predictions, truths and photos. Out: overlays, a comparison sheet, `report.html`. Read
first: `pictures.py`, then `page.py` and `template.html`.
"""
