"""The settings of the evaluations: frozen dataclasses, checked on construction, each in a file of its protocol's name.

Nothing here needs torch, so that a command line is read, and refused, at once; `tests/train/test_cli.py` keeps it so.
"""
