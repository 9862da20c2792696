"""`python -m cascade`."""

from cascade.cli.main import main

main()
