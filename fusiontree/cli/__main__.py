"""`python -m fusiontree.cli`."""

from fusiontree.cli import main

main()
