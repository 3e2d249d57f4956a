"""`python -m mechguard`."""

from mechguard.cli import main

main()
