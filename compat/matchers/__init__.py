"""One matcher a rule: a function of one changed fact that says what to show, or None.

RULES: {section: {rule id: matcher}}, every matcher of the section is asked about every fact of it that changed.
FOLLOWS: {section: function} is asked first: "" when the change means nothing, a rule id when that rule, fired
elsewhere, already tells of it, None when the matchers are to judge. A change that nobody claims is a finding
of its own, so that a new kind of fact cannot pass unnoticed.
"""

from compat.matchers import api, cost, crossing, data, load, numeric

_MODULES = (load, crossing, api, data, numeric, cost)
RULES = {section: rules for module in _MODULES for section, rules in module.RULES.items()}
FOLLOWS = {section: rule for module in _MODULES for section, rule in module.FOLLOWS.items()}
