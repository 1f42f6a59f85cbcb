"""`python -m mythos_export.cli`."""

from mythos_export.cli import main

main()
