"""REST by the Open Inference Protocol: ``app.py`` has the routes, ``codec.py`` turns bytes into
arrays and back."""
