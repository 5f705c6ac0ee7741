"""The settings of the methods: frozen dataclasses, checked on construction, beside what follows from them alone.

Nothing here needs torch, so that a command line is read, and refused, at once; `tests/train/test_cli.py` keeps it so. A
method's settings lie in the file of the method's own name.
"""
