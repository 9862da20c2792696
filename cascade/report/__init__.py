"""family.json to tables, curves, HTML and cards. Imports no torch."""
