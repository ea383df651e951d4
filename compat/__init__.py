"""compat: judges a nanoVLM-style model (a fork, a git ref, a class) in its own process, and logs it."""
