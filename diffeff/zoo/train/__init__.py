"""Train the bundled models: ``python -m diffeff.zoo.train NAME [--minutes M]``."""
