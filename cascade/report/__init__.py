"""Family records, tables, curves, HTML, member cards. Imports no torch."""
