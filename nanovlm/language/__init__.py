"""Language models, one file each; registry.py names them."""
