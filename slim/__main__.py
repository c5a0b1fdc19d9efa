"""`python -m slim`, which torchrun starts."""

from slim.cli import main

main()
