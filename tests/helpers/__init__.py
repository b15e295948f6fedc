"""What the tests share: formulas.py (the mathematics), networks.py and kinds.py (models and their
definition), kernels.py (cases of the ops), streaming.py, errors.py, pages.py (documentation)."""
