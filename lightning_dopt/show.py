"""What ``dopt list``, ``describe``, ``topology`` and ``simulate`` print: text about methods; nothing is trained."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType

import docstring_parser
from torch import nn

from lightning_dopt import apply, combine, fragments, local, outer, plans, schedules, topology, what
from lightning_dopt._part import Part
from lightning_dopt.closed_form import closed_form
from lightning_dopt.comm import Link
from lightning_dopt.compress import registry as codecs
from lightning_dopt.forecast import Forecast, Shapes, forecast
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.topology import registry as graphs
from lightning_dopt.topology.base import Topology

_ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")
_DECIMAL = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))

# ---------------------------------------------------------------------- what there is


def methods() -> dict[str, Callable[..., Plan]]:
    """The published methods by name."""
    return {name: getattr(plans, name) for name in plans.__all__}


def parts() -> dict[str, dict[str, type[Part]]]:
    """Everything a plan can be made of, by kind: classes by the name under which the command line knows them."""
    return {
        "topologies": dict(graphs.classes()),
        "codecs": dict(codecs.classes()),
        "schedules": _members(schedules, schedules.When),
        "tensors": _members(what, what.What) | _members(fragments, what.What),
        "combine": _members(combine, combine.Combine),
        "outer optimizers": _members(outer, outer.Outer),
        "apply": _members(apply, apply.Apply) | _members(apply, apply.Merge),
        "corrections": _members(local, local.Correction),
    }


def _members(module: ModuleType, base: type[Part]) -> dict[str, type[Part]]:
    return {
        name: cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, base) and cls is not base and not inspect.isabstract(cls)
    }


def method(name: str) -> Callable[..., Plan]:
    """The method of that name.

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    known = methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}: must be one of {', '.join(known)}")
    return known[name]


def graph(name: str) -> type[Topology]:
    """The topology of that name.

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    for known, cls in graphs.classes().items():
        if name in (known, cls.__name__):
            return cls
    raise ValueError(f"unknown topology {name!r}: must be one of {', '.join(graphs.names())}")


def title(made: Callable[..., object]) -> str:
    """What a method or a part is, in a line: of a method that has a module to itself, the module's first line."""
    module = sys.modules[made.__module__]
    alone = inspect.isfunction(made) and sum(f.__module__ == made.__module__ for f in methods().values()) == 1
    text = (module.__doc__ if alone else inspect.getdoc(made)) or ""
    return _plain(text.partition("\n\n")[0])


def papers(made: Callable[..., object]) -> list[str]:
    """Links to the papers that a docstring names."""
    return [f"https://arxiv.org/abs/{number}" for number in dict.fromkeys(_ARXIV.findall(inspect.getdoc(made) or ""))]


def shapes_of(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of a module's trainable parameters, and the number of floating point elements in the buffers it saves."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    saved = model.state_dict().keys()  # the strategy averages no others
    return shapes, sum(b.numel() for name, b in model.named_buffers() if name in saved and b.is_floating_point())


# ---------------------------------------------------------------------- the four texts


def listing(registered: Iterable[str], others: Mapping[str, str]) -> str:
    """All methods with their papers, and all parts.

    Args:
        registered: Names of methods that ``Trainer(strategy=...)`` knows.
        others: Names of strategies without a plan, and what they are.
    """
    known = set(registered)
    lines = ["methods (* Trainer(strategy=NAME); all of them: ReplicaStrategy(plan=lightning_dopt.plans.NAME(...)))"]
    for name, function in methods().items():
        lines.append(f"  {name + ('*' if name in known else ''):<22}{title(function)}")
        lines.append(f"  {'':<22}{' '.join(papers(function))}")
    lines += ["", "strategies without a plan", *(f"  {name + '*':<22}{text}" for name, text in others.items())]
    for kind, members in parts().items():
        lines += ["", kind, *(f"  {name:<24}{cls.__name__:<24}{title(cls)}" for name, cls in members.items())]
    return "\n".join(lines)


def description(
    name: str,
    arguments: Mapping[str, object],
    plan: Plan,
    shapes: Shapes,
    buffers: int,
    n: int,
    steps: int,
    link: Link | None = None,
) -> str:
    """A method, its options, its plan and what the plan costs; over a ``link``, if the way of messages is to be chosen for one."""
    function = method(name)
    told = forecast(plan, n, shapes, steps, link, buffers=buffers)
    lines = [f"{name}: {title(function)}", *papers(function)]
    lines += ["", *_options(function, arguments)]
    for label, sync in zip(plan.labels(), plan, strict=True):
        lines += ["", f"sync '{label}'", *_fields(sync)]
        lines += _ways(told.transports.get(label, {}), told.reasons.get(label, ""))
    if plan.corrections:
        lines += ["", "corrections", *(f"  {c!r}" for c in plan.corrections)]
    lines += ["", f"{_model(shapes)}, {n} workers, {steps} steps: payload sent by the busiest worker", *_traffic(told)]
    return "\n".join([*lines, "", *_memory(told)])


def topology_text(graph: Topology, n: int) -> str:
    """What is known about a graph with ``n`` workers."""
    s = topology.summary(graph, n)
    check = topology.check_matrix(graph.matrix(n))
    period = "never repeats" if s.period is None else f"repeats after {s.period} round{'s' * (s.period > 1)}"
    exact = f"exact after {s.rounds} round{'s' * (s.rounds > 1)}" if s.exact else "never exact"
    rows = [
        ("rounds", period),
        ("degree", f"at most {s.max_degree} heard, {s.messages:g} messages per rank and round"),
        (
            "links",
            ("one way" if s.directed else "both ways") + (", all connected" if s.connected else ", NOT connected"),
        ),
        ("matrix", _properties(check, s.symmetric)),
        ("consensus rate", f"{s.rate_per_round:.6g} per round" + (f" (over {s.rounds})" if s.rounds > 1 else "")),
        ("spectral gap", f"{s.spectral_gap:.6g}"),
        ("smallest eigenvalue", f"{round(s.lambda_min, 9) + 0.0:.6g}"),
        ("mean", exact),
    ]
    return "\n".join([f"{graph!r}, {n} workers: {title(type(graph))}", *(f"  {k:<21}{v}" for k, v in rows)])


def weighted_text(report: topology.WeightedReport) -> str:
    """What is known about ranks of unequal weight on one graph: weighted losses (I) beside weighted mixing (II)."""
    lam, penalties, bounds = report.weights, report.penalties, report.bounds
    span = f"{min(lam):.4g} to {max(lam):.4g} times the mean, sqrt(max / min) = {report.kappa:.4g}"
    step = f"factor {report.plain_step:.4g} in one round at worst"
    rows = [
        ("weights", span, ""),
        ("degree match", f"{report.degree_match:.4g} (1 if degrees are proportional to weights)", ""),
        ("", "I: weighted losses", "II: weighted mixing"),
        ("matrix", "Metropolis-Hastings", f"row stochastic, '{report.rule}'"),
        ("own rate per round", f"{report.plain_rate:.6g}", f"{report.weighted_rate:.6g}"),
        ("smallest eigenvalue", f"{round(report.plain_lambda_min, 9) + 0.0:.4g}", f"{report.weighted_lambda_min:.4g}"),
        ("weighted distance", step, f"factor {report.weighted_rate:.4g}"),
        ("  over 50 rounds", f"up to {report.plain_prefactor:.4g} times the rate's power", "exactly the rate's power"),
        ("bound: geometry", f"{penalties.geometry:.4g}", "1"),
        ("bound: injection", f"{penalties.injection:.4g}", "1"),
        ("largest local step", f"{penalties.step:.4g} lr", "1 lr"),
        ("gap at least", "", f"{report.gap_bound:.4g} (from I's matrix)"),
        ("Theorem 7.1", f"{bounds.left:.4g} {'>=' if bounds.holds else '<'} {bounds.right:.4g}", "II better if >="),
    ]
    lines = [f"  {a:<21}{b:<42}{c}".rstrip() for a, b, c in rows]
    return "\n".join(["weighted ranks", *lines, "", report.recommendation])


def simulation(
    name: str,
    plan: Plan,
    shapes: Shapes,
    buffers: int,
    n: int,
    steps: int,
    link: Link | Sequence[Link],
    step_seconds: float | Sequence[float],
    lr: float | None = None,
) -> str:
    """The cost of a plan beside that of an all-reduce of the gradients in every step.

    Args:
        name: Of the method.
        plan: The plan.
        shapes: Shape of each trainable parameter by name.
        buffers: Elements of averaged buffers.
        n: Number of workers.
        steps: Optimizer steps.
        link: Speed of the workers' links, one for all or one per rank.
        step_seconds: Seconds of one inner step, one number or one per rank.
        lr: Peak of a cosine schedule of the learning rate, for plans that read it.
    """
    # one message: buckets hide behind backward, which the virtual clock does not know, so their latencies would be unfair
    every = forecast(Plan([Sync(what=what.Gradients(bucket_mb=0))]), n, shapes, steps, link, step_seconds, buffers)
    rate = None if lr is None else lambda t: 0.5 * lr * (1.0 + math.cos(math.pi * t / steps))
    mine = forecast(plan, n, shapes, steps, link, step_seconds, buffers, lr=rate)
    formula = closed_form(plan, n, shapes, link, step_seconds) if not buffers and lr is None else None
    links = [link] if isinstance(link, Link) else list(link)
    least, most = min(each.mbit for each in links), max(each.mbit for each in links)
    speed = (
        f"{least:.3g} to {most:.3g} Mbit/s" if least < most else f"{least:g} Mbit/s" if least else "unlimited bandwidth"
    )
    rows = [
        ("", name, "all-reduce every step"),
        ("bytes per worker", _bytes(max(mine.bytes)), _bytes(max(every.bytes))),
        ("  per step", _bytes(mine.bytes_per_step), _bytes(every.bytes_per_step)),
        ("  largest step", _bytes(mine.peak_step_bytes), _bytes(every.peak_step_bytes)),
        ("time", _seconds(mine.seconds), _seconds(every.seconds)),
        ("  of it waiting", _seconds(mine.stall_s), _seconds(every.stall_s)),
        ("  per step", _seconds(mine.seconds / steps), _seconds(every.seconds / steps)),
        ("extra memory", _bytes(sum(mine.memory.values())), _bytes(sum(every.memory.values()))),
    ]
    if isinstance(step_seconds, (int, float)):
        each = _seconds(step_seconds)
    else:
        each = f"{_seconds(min(step_seconds))} to {_seconds(max(step_seconds))}"
    lines = [f"{_model(shapes)}, {n} workers, {steps} steps of {each}, {speed}, {links[0].ms:g} ms", ""]
    lines += [f"{a:<20}{b:>16}{c:>24}" for a, b, c in rows]
    if formula is not None:
        told = f"{_bytes(formula.bytes_per_step)} and {_seconds(formula.seconds_per_step)} per step"
        lines += ["", f"closed formula, in the long run: {told}"]
    sent, others = max(mine.bytes), max(every.bytes)
    if sent and others:
        lines += [
            "",
            f"{others / sent:.4g} times fewer bytes, {every.seconds / mine.seconds:.4g} times as fast"
            if mine.seconds
            else f"{others / sent:.4g} times fewer bytes",
        ]
    return "\n".join(lines)


# ---------------------------------------------------------------------- pieces of text


def _plain(text: str) -> str:
    """Docstring text on one line, without its markup."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", " ".join(text.split())).replace("``", "")


def _options(function: Callable[..., Plan], arguments: Mapping[str, object]) -> list[str]:
    told = {p.arg_name: p.description or "" for p in docstring_parser.parse(inspect.getdoc(function) or "").params}
    signature = inspect.signature(function).parameters
    if not signature:
        return ["no options"]
    lines = [f"  {'option':<16} {'value':<24} {'default':<10} meaning"]
    for name, parameter in signature.items():
        meaning = _plain(told.get(name, ""))
        lines.append(f"  {name:<16} {arguments[name]!r:<24} {parameter.default!r:<10} {meaning}")
    return lines


def _fields(sync: Sync) -> list[str]:
    return [f"  {name:<10}{value!r}" for name, value in sync.arguments().items()]


def _ways(ways: Mapping[str, int], reason: str) -> list[str]:
    """How messages travel, what the other transports would take, and why."""
    each = [f"{way} {_bytes(nbytes)}" for way, nbytes in ways.items()]
    other = f" (instead of {', '.join(each[1:])})" if each[1:] else ""
    return [f"  travels   {each[0]} per exchange{other}: {reason}"] if each else []


def _traffic(told: Forecast) -> list[str]:
    lines = [f"  {'sync':<20}{'rounds':>8}{'per round':>14}{'per step':>14}"]
    for label, rounds in told.rounds.items():
        total = told.sync_bytes(label)
        lines.append(
            f"  {label:<20}{rounds:>8}{_bytes(total / rounds if rounds else 0):>14}{_bytes(total / told.steps):>14}"
        )
    lines.append(f"  {'all':<20}{'':>8}{'':>14}{_bytes(told.bytes_per_step):>14}")
    lines.append(f"  at most {_bytes(told.peak_step_bytes)} in one step")
    budgets = told.replanned.items()
    return lines + [f"  {label}: bytes at the start, planned anew every {every} rounds" for label, every in budgets]


def _memory(told: Forecast) -> list[str]:
    head = "memory per worker beyond model, gradients and inner optimizer"
    if not told.memory:
        return [f"{head}: none"]
    return [
        f"{head}: {_bytes(sum(told.memory.values()))}",
        *(f"  {k:<20}{_bytes(v):>10}" for k, v in told.memory.items()),
    ]


def _model(shapes: Shapes) -> str:
    count = sum(_numel(s) for s in shapes.values())
    return f"{count:,} parameters in {len(shapes)} tensor{'s' * (len(shapes) > 1)} ({_bytes(4 * count)})"


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _properties(check: topology.MatrixCheck, symmetric: bool) -> str:
    rows, columns = (error <= check.tolerance for error in (check.row_error, check.column_error))
    sums = {
        (True, True): "doubly stochastic",
        (True, False): "row stochastic",
        (False, True): "column stochastic (push-sum)",
    }
    found = [
        sums.get((rows, columns), "NEITHER ROWS NOR COLUMNS sum to one"),
        *(["negative weights"] if not check.nonnegative else []),
        "symmetric" if symmetric else "not symmetric",
    ]
    return ", ".join(found)


def _bytes(count: float) -> str:
    for unit, name in _DECIMAL:
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count:.4g} B"


def _seconds(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.4g} h"
    return f"{seconds / 60:.4g} min" if seconds >= 120 else f"{seconds:.4g} s"
