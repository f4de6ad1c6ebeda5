"""Scripts behind the entries of docs/lab.md: what a recipe alone cannot express."""
