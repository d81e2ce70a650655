"""`python -m diffeff`."""

from diffeff.cli import main

if __name__ == "__main__":
    main()
