"""What a report shows of a model and no check judges: how fast it writes, and which config fields decide loading."""

from __future__ import annotations

import time

from .adapters.configs import config_default, config_values, field_names, make_config
from .protocol import NotSupported
from .readings import jsonable

REPEATS = 3  # the first call of a process is slower, so the best of these is told


class FigureQuestions:
    """``ask_speed`` and ``ask_loading_fields`` of a Session."""

    def ask_speed(self, adapter, rows, new_tokens):
        """Tokens a second of greedy generation after ``rows``, prefill included; the best of a few."""
        import torch

        batch, best = adapter.batch(rows), 0.0
        adapter.generate(batch, 1)
        for _ in range(REPEATS):
            began = time.perf_counter()
            ids = adapter.generate(batch, new_tokens)
            if adapter.device == "cuda":
                torch.cuda.synchronize()
            best = max(best, sum(map(len, ids)) / (time.perf_counter() - began))
        if not best:
            raise NotSupported("generate gave no token")
        return {"tokens_per_s": best}

    def ask_loading_fields(self, adapter):
        """{field: [its default, what another value does]} of the counts in the config that decide whether weights fit.

        "shapes": names or shapes of the state dict differ. "refused": no other value goes with the rest.
        """
        from .effects import changed_values

        if adapter.combo["scale"] != "tiny":
            raise NotSupported("fields are tried at tiny scale only: each try builds a model")
        cls = type(adapter.config)
        values = config_values(adapter.config)
        before = layout(adapter, values)
        found = {}
        for name in field_names(cls):
            now = values.get(name)
            if not isinstance(now, int) or isinstance(now, bool):  # only a count sizes a tensor
                continue
            word = "refused" if now else None
            for value in changed_values(name, now, None):
                after = layout(adapter, {**values, name: value})
                if after not in (before, None):
                    word = "shapes"
                    break
                word = word if after is None else None
            if word:
                found[name] = [jsonable(config_default(cls, name)), word]
        return {"fields": found}


def layout(adapter, values):
    """Name and shape of everything in the state dict of a model of these values; None where it is refused."""
    try:
        model = adapter.build_model(make_config(type(adapter.config), values))
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    except Exception:  # of any type: it is the target's way to say no
        return None
