"""What every stage stands on: errors, configuration, files, the terminal, and the process.

In: settings, bytes and signals. Out: checked dataclasses, files that are whole or absent, errors of
one line. Knows nothing of images. Read first: `errors.py`.
"""
