"""`python -m fna_lab`."""

from fna_lab.cli import main

if __name__ == "__main__":
    main()
