"""Lets plain pytest run the suites: `pytest compat/suites --target . --combo siglip2-smollm2`.

`compat run` does not read this file: it hands pytest the plugin itself.
"""

pytest_plugins = ["compat.plugin"]
