"""Filters: steps that drop the documents, and C4's also the lines, that aren't worth training on.

`chain.filters` makes the list of steps that a configuration asks for; `config.py` has their thresholds.
"""
