"""Other frameworks: each a module of its own, imported by whoever uses it. Nothing of the package imports them."""
