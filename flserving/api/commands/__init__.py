"""What the commands of ``flserving`` share, and those on a registry.

``parser.py`` takes options from the command line and the environment; ``registry.py`` looks at a
registry and moves its aliases. ``cli.py`` beside this folder puts the commands together.
"""
