"""Studies: several training runs of one question, and the page that compares them.

A study file comes in; a folder with a run for each variant and seed, `study.json` and `study.html`
go out. Read `study.py` first.
"""
