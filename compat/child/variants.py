"""Questions of a lock about the model used otherwise than by default: sampled, ended, with dropout, with loaded files.

Unusual: nothing that is random is compared. What a draw is made from is caught where it is drawn; dropout shows
as how far a module's outputs lie apart over seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import typing

from .protocol import NotSupported, theirs
from .readings import jsonable
from .sketch import first_tensor, sketch

DECISIVE = 1e-3  # of the likeliest draw's probability: nearer ones may change places on another machine
SHOWN = 8  # probabilities of a draw
STRENGTH = 0.5  # of dropout
SEEDS = 12
SCHEDULES, OPTIMIZERS = ("learning_rate", "get_lr"), ("make_optimizer", "get_optimizer", "configure_optimizers")
RUN = 1000  # steps of the run whose schedule is asked
MOST_CHOICES = 32  # combinations of a config's choices that are tried
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0)


class VariantQuestions:
    """More ``ask_lock_*``. Every answer is {"facts": {path: value}}."""

    def ask_lock_sampling(self, adapter, rows, options, bf16=False):
        """What the first two new tokens are drawn from: how many ids, the likeliest probabilities, the second id.

        The second likeliest is what is drawn; where it is not told apart, nothing is said of the next draw.
        """
        taken = inspect.signature(self.subject.model_class.generate).parameters
        if missing := [name for name in options if name not in taken]:
            raise NotSupported(f"generate takes no {', '.join(missing)}")
        draws, kinds = [], []
        if bf16:
            from .models import in_bf16

            adapter = in_bf16(adapter)
        batch = adapter.batch(rows)
        if bf16:
            batch.pictures = [[picture.bfloat16() for picture in row] for row in batch.pictures]

        def second(probabilities, num_samples, *args, **kwargs):
            kinds.append(str(probabilities.dtype).replace("torch.", ""))
            draws.append(probabilities.detach().double().reshape(-1, probabilities.shape[-1])[0])
            places = probabilities.topk(min(2, probabilities.shape[-1]), dim=-1).indices
            return places[..., -1:].expand(*places.shape[:-1], num_samples)

        call = functools.partial(adapter.model.generate, **options)
        with replaced(adapter.model.__dict__, "generate", call), replaced_draw(second):
            ids = adapter.generate(batch, 2, greedy=False)
        if not draws:
            raise NotSupported("generate draws by other means than torch.multinomial")
        if bf16:  # rounded anew by every refactor; in which precision a draw is made stays
            return {"facts": {"dtype": kinds[0]}}
        tops = [[float(p) for p in draw.sort(descending=True).values[: SHOWN + 1]] for draw in draws[:2]]
        known = tops[0]
        apart = len(known) > 2 and known[0] - known[1] > DECISIVE * known[0] < known[1] - known[2]
        facts = {"support": int((draws[0] > 0).sum()), "probabilities": [p for p in known[:SHOWN] if p > 0]}
        then = [p for p in tops[1][:SHOWN] if p > 0] if apart and len(tops) > 1 else None
        return {"facts": {**facts, "second": ids[0][0] if apart else None, "then.probabilities": then}}

    def ask_lock_stopped(self, adapter, rows, max_new_tokens):
        """Greedy ids that two ids in a row stop, later or at once, and what a streamer was given of them."""
        taken = inspect.signature(self.subject.model_class.generate).parameters
        if missing := [name for name in ("stop", "streamer") if name not in taken]:
            raise NotSupported(f"generate takes no {', '.join(missing)}")
        plain = adapter.generate(adapter.batch(rows), max_new_tokens)
        pair = next((row[i : i + 2] for row in plain for i in range(2, len(row) - 1) if row[i] != row[i + 1]), None)
        if pair is None:
            raise NotSupported(f"greedy decoding repeats one token for {max_new_tokens}: no end would show")
        streamed = Streamed()
        stop = [pair, plain[-1][:2]]  # the last row ends with its second token
        call = functools.partial(adapter.model.generate, stop=stop, streamer=streamed)
        with replaced(adapter.model.__dict__, "generate", call):
            ids = adapter.generate(adapter.batch(rows), max_new_tokens)
        given = [list(row) + [-1] * streamed.ends for row in zip(*streamed.ids)]
        facts = {"": ids, ".streamed": given}
        return {"facts": {n: {"ids": r, "decided": decided(adapter, rows, plain, r)} for n, r in facts.items()}}

    def ask_lock_choices(self, adapter, rows):
        """Logits under the config's other choices: each switch alone, and fields that list their values as a Literal.

        Of those every combination, where they are few. A case is named by what it changes; one that fails says how.
        """
        import torch

        from .adapters.configs import config_values
        from .models import remade, rms

        values, facts = config_values(adapter.config), {}
        choices = {name: known for name, known in literals(type(adapter.config)).items() if values.get(name) in known}
        tried = [{name: not value} for name, value in values.items() if isinstance(value, bool)]
        if math.prod(map(len, choices.values())) <= MOST_CHOICES:
            tried += [dict(zip(choices, chosen)) for chosen in itertools.product(*choices.values())]
        for named in tried:
            named = {name: named[name] for name in sorted(named) if values[name] != named[name]}
            if not named:
                continue
            case = "choice " + " ".join(f"{name}={value}" for name, value in named.items())
            try:
                other = remade(adapter, adapter.changed_config(named))
                with torch.no_grad():
                    logits = torch.cat([row.reshape(-1) for row in other.logits(other.batch(rows, "none"))])
            except Exception as error:  # of any type: the target's way to say no
                facts[case + ".error"] = type(error).__name__
                continue
            facts[case + ".logits"], facts[case + ".rms"] = sketch(logits), rms(logits)
        return {"facts": facts}

    def ask_lock_wide_picture(self, adapter):
        """What the vision encoder makes of a picture twice as wide as it is high."""
        import torch

        from . import probe
        from .models import rms

        encoder = getattr(adapter.model, "vision_encoder", None)
        if encoder is None:
            raise NotSupported("the model has no vision_encoder to be given a picture of another shape")
        side = adapter.image_size
        wide = torch.cat([probe.picture(number, side) for number in (0, 1)], 2)[None].to(adapter.device)
        with torch.no_grad(), theirs():
            features = first_tensor(encoder(wide)).float()
        return {"facts": {"logits": sketch(features), "rms": rms(features)}}

    def ask_lock_refusals(self, adapter, rows):
        """{a call that asks for what cannot be: the type that is raised, or "accepted"}."""
        import torch

        encoder, side = getattr(adapter.model, "vision_encoder", None), adapter.image_size
        calls = {
            "generate.negative_length": lambda: adapter.generate(adapter.batch(rows), -1),
            "forward.picture_left_out": lambda: adapter.logits(without_pictures(adapter.batch(rows))),
        }
        if encoder is not None:
            for name, height, width in (("half_a_row", side + 1, side), ("half_a_column", side, side + 1)):
                picture = torch.zeros(1, 3, height, width, device=adapter.device)
                calls[f"vision_encoder.{name}"] = functools.partial(encoder, picture)
        facts = {}
        for name, call in calls.items():
            try:
                with torch.no_grad():
                    call()
            except NotSupported as error:
                facts[name] = {"unsupported": str(error)}
            except Exception as error:  # of any type: the target's way to refuse
                facts[name] = type(error).__name__
            else:
                facts[name] = "accepted"
        return {"facts": facts}

    def ask_lock_hub_fields(self, adapter, how="without"):
        """{key of the backbones' config.json: the config's fields that its absence changes, or what is raised}.

        how: "without", or "changed" for another value of the key. Key "everything": all fields, of a config.json
        that says nothing.
        """
        if not hasattr(adapter, "hub_readers"):
            raise NotSupported("what config.json on the Hub decides is read in no one place")
        found = {}
        for role, read, given in adapter.hub_readers():
            with theirs():
                whole = read(given)
            if how == "changed":
                cases = {key: {**given, key: changed} for key in given if (changed := another(given[key])) is not None}
            else:
                cases = {key: {name: value for name, value in given.items() if name != key} for key in given}
                cases["everything"] = {}
            for key, rest in cases.items():
                known = {} if key == "everything" else whole
                try:
                    fields = read(rest)
                except Exception as error:  # of any type: the target's way to say that it cannot do without
                    found[f"{role}.{key}"] = type(error).__name__
                    continue
                changed = {n: jsonable(value) for n, value in fields.items() if n not in known or value != known[n]}
                found[f"{role}.{key}"] = changed
        return {"facts": found}

    def ask_lock_ending(self, adapter, rows, max_new_tokens):
        """Greedy ids of a batch in which an id ends a text that another one would follow."""
        plain = adapter.generate(adapter.batch(rows), max_new_tokens)
        followed = [a for row in plain for a, b in zip(row, row[1:]) if a != b]
        if not followed:
            raise NotSupported(f"greedy decoding repeats one token for {max_new_tokens}: no end would show")
        ids = adapter.generate(adapter.batch(rows), max_new_tokens, eos=followed[0])
        return {"facts": {"": {"ids": ids, "decided": decided(adapter, rows, plain, ids)}}}

    def ask_lock_rates(self, adapter):
        """The schedule's values at shares of a run, and the learning rate of each parameter, by the training config."""
        from .adapters.configs import blank, config_values, make_config

        if self.subject.found.train_config is None:
            raise NotSupported("no training config class was found")
        config = blank(self.subject.load(self.subject.found.train_config))
        values = config_values(config)
        if "max_training_steps" in values:  # a run of one length: its default is a fact of its own
            config = make_config(type(config), {**values, "max_training_steps": RUN})
        told = {"cfg": config, "config": config, "train_cfg": config}
        facts = {}
        for share in SHARES:
            step = int(share * RUN)
            known = {**told, "step": step, "it": step, "peak": 1.0, "max_lr": 1.0, "max_steps": RUN}
            for rate in self.called(SCHEDULES, known):
                facts[f"schedule.{share:.0%}"] = float(rate)
        for optimizer in self.called(OPTIMIZERS, {**told, "model": adapter.model}):
            groups = optimizer.param_groups
            rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
            for name, parameter in adapter.model.named_parameters():
                facts[f"rate.{name}"] = rates.get(id(parameter), 0.0)
        if not facts:
            raise NotSupported(f"no {', '.join(SCHEDULES + OPTIMIZERS)} with arguments that can be supplied was found")
        return {"facts": facts}

    def called(self, names, known):
        """[what the nearest of the target's functions of these names gives that takes no more than is known], or []."""
        from .adapters.configs import fitting

        places = [place for name in names for place in sorted(self.subject.found.functions.get(name, ()), key=str)]
        for place in places:
            function = self.subject.load(place)
            try:
                arguments = fitting(function, known)
            except NotSupported:
                continue
            with theirs():
                return [function(**arguments)]
        return []

    def ask_lock_dropout(self, adapter, rows, field):
        """With ``field`` raised: the logits in evaluation, and how random each module is in training."""
        import torch

        from .adapters.configs import config_values, make_config
        from .models import remade

        values = config_values(adapter.config)
        if field not in values:
            raise NotSupported(f"the config has no {field}")
        other = remade(adapter, make_config(type(adapter.config), {**values, field: STRENGTH}))
        calls, hooks = {}, []
        for name, module in other.model.named_modules():
            hooks.append(
                module.register_forward_hook(functools.partial(keep, calls, name or "model"), with_kwargs=True)
            )
        batch = other.batch(rows, "none")
        with torch.no_grad():
            logits = torch.cat([row.reshape(-1) for row in other.logits(batch)])
            for hook in hooks:
                hook.remove()
            other.model.train()
            facts = {"eval": sketch(logits)}
            for name, (module, args, kwargs) in calls.items():
                apart = spread(module, args, kwargs)
                if apart:
                    facts[f"train.{name}"] = apart
        return {"facts": facts}

    def ask_lock_backbone_weights(self, adapter, larger=False):
        """Sketches of the tensors that loading pretrained backbones decides; larger: for pictures twice the size."""
        import torch

        from . import probe
        from .adapters.configs import config_values, make_config

        config = adapter.backbone_config()
        if not [name for name, role in adapter.hub_names(config) if role != "tokenizer"]:
            raise NotSupported("the config names no backbone repositories")
        if larger:
            values = config_values(config)
            more = {"vit_img_size": 2, "mp_image_token_length": 4, "max_img_size": 2}
            more = {name: factor * values[name] for name, factor in more.items() if values.get(name)}
            try:
                config = make_config(type(config), {**values, **more})
            except Exception as error:  # of any type: the target's way to say no
                raise NotSupported(f"the config takes no picture of twice the size: {error}") from None
        states = []
        for seed in (0, 1):
            probe.seed(seed)
            with theirs():
                states.append(adapter.build_model(config, load_backbone=True).state_dict())
        first, second = states
        kept = {name: tensor for name, tensor in first.items() if tensor.is_floating_point()}
        return {"facts": {n: sketch(t) for n, t in kept.items() if t.numel() and bool(torch.equal(t, second[n]))}}


@functools.lru_cache(maxsize=16)
def literals(config_class):
    """{field: values} of the fields annotated as a Literal; nobody may change it."""
    try:
        hints = typing.get_type_hints(config_class)
    except Exception:  # an annotation that names nothing importable
        return {}
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}


def without_pictures(batch):
    """The batch, whose text speaks of pictures that it does not hold."""
    return dataclasses.replace(batch, pictures=[[] for _ in batch.pictures])


def another(value):
    """Another value of the kind, None where there is no plain one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value or 1
    return value + "x" if isinstance(value, str) else None


def decided(adapter, rows, plain, ids):
    """Places a row of ``ids`` where its id was chosen beyond doubt, or is not what ``plain`` greedy decoding chose."""
    from .lock import DECISIVE as APART
    from .models import top_two_margins

    found = []
    for row, chosen, new in zip(rows, plain, ids):
        margins = top_two_margins(adapter, row, chosen)
        sure = {place for place, margin in enumerate(margins) if margin > APART}
        found.append([p for p, token in enumerate(new) if p in sure or [token] != chosen[p : p + 1]])
    return found


class Streamed:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.ids, self.ends = [], 0

    def put(self, ids):
        self.ids.append(ids.tolist())

    def end(self):
        self.ends += 1


def keep(calls, name, module, args, kwargs, out):
    """A hook: what a module was first called with, where it gives a tensor."""
    if name not in calls and first_tensor(out) is not None:
        calls[name] = (module, args, kwargs)


def spread(module, args, kwargs):
    """How far a module's outputs lie apart over seeds, of their size; 0 where they do not."""
    import torch

    from . import probe

    outs = []
    for seed in range(SEEDS):
        probe.seed(seed)
        try:
            outs.append(first_tensor(module(*args, **kwargs)).double())
        except Exception:  # what it was called with is used up, a cache for one
            return 0.0
        if len(outs) == 2 and torch.equal(*outs):
            return 0.0
    stacked = torch.stack(outs)
    return float(stacked.std(0).pow(2).mean().sqrt() / stacked.pow(2).mean().sqrt())


@contextlib.contextmanager
def replaced(names, name, value):
    """Another value for a name of a namespace inside the block."""
    names[name] = value
    try:
        yield
    finally:
        del names[name]


@contextlib.contextmanager
def replaced_draw(function):
    """Another torch.multinomial inside the block."""
    import torch

    real, torch.multinomial = torch.multinomial, function
    try:
        yield
    finally:
        torch.multinomial = real
