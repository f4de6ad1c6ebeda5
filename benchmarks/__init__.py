"""Side-by-side measurements. Each prints a table of ratios and, last, one JSON object with ``name`` and ``ratios``."""
