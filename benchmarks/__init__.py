"""Side-by-side measurements.

Each prints a table, and then one line with a JSON object that has ``name`` and ``ratios``.
"""
