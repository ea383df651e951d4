"""Vision encoders, one file each; registry.py names them."""
