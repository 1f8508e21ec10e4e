"""What every stage stands on: errors, configuration, files, the terminal, and being stopped.

In: settings, bytes and signals. Out: checked dataclasses, files that are whole or absent, one-line
errors. Knows nothing of images. Read first: `errors.py`.
"""
