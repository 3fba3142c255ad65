"""Command line: ``dopt fit`` and its kin are Lightning's; ``list``, ``describe``, ``topology``, ``simulate`` ours."""

from __future__ import annotations

import inspect
import math
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NoReturn

import torch
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

from lightning_dopt import show, topology
from lightning_dopt.comm import Link
from lightning_dopt.forecast import square_layers
from lightning_dopt.plan import Plan
from lightning_dopt.strategies import NAMES, WITHOUT_PLAN
from lightning_dopt.topology import NodeRule, Topology
from lightning_dopt.workers import supervise

HELP = """usage: dopt COMMAND ...

  dopt fit|validate|test|predict -c FILE.yaml [--trainer.strategy=diloco] ...   Lightning's command line
  dopt list                                                  all methods, topologies, codecs and other parts
  dopt describe METHOD [--OPTION VALUE ...]                  options, plan, bytes and memory
  dopt simulate METHOD -n N --mbit 20 --ms 25 [...]          bytes and time beside an all-reduce in every step
  dopt topology NAME -n N [--plot FILE.png|svg]              degree, spectral gap, rounds to the exact mean
  dopt workers -n N -- COMMAND ...                           N workers of an elastic run, each started again when it dies
  dopt topology NAME -n N --lambda WEIGHTS                   weighted losses or weighted mixing on that graph?

`dopt COMMAND --help` explains the options of a command."""

LIGHTNING = ("fit", "validate", "test", "predict")


class BadInputError(Exception):
    """What the user asked for cannot be done; the message says why."""


class _OneLine(ArgumentParser):
    """A parser that reports in one line, without the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise :class:`BadInputError`; parsers of nested classes report to the parser around them as usual."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise BadInputError(_line(message))

    def make(self, given: Any) -> Any:
        """The objects that the parsed options describe."""
        return getattr(self, "instantiate", self.instantiate_classes)(given)  # renamed in jsonargparse 4.49


class _LightningParser(_OneLine, LightningArgumentParser):
    """Lightning's parser with errors in one line."""


class DoptCLI(LightningCLI):
    """Lightning's command line, for which wrong input is no reason for a traceback."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """See ``LightningCLI``."""
        parser = _LightningParser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="path of a YAML file; later options win")
        return parser

    def instantiate_classes(self) -> None:
        """See ``LightningCLI``; all mistakes in a configuration that its types cannot show surface here."""
        config = self.config[self.config.subcommand] if self.subcommand else self.config
        checkpoint = getattr(config, "ckpt_path", None)
        words = ("last", "best", "hpc", "registry")
        if checkpoint and checkpoint not in words and "://" not in checkpoint and not Path(checkpoint).exists():
            raise BadInputError(f"--ckpt_path={checkpoint}: no such file")
        strategy = config.trainer.strategy
        if isinstance(strategy, str) and strategy.lower() not in {"auto", *StrategyRegistry.available_strategies()}:
            known = f"one of {', '.join([*NAMES, *WITHOUT_PLAN])}, a name of Lightning's (auto, ddp, fsdp, ...)"
            raise BadInputError(f"unknown strategy {strategy!r}: {known}, or a class path with arguments")
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            raise BadInputError(_line(str(error))) from error


def train(arguments: Sequence[str] | None) -> None:
    """``dopt fit`` and its kin; ``None`` reads the command line, which the processes of other ranks run again."""
    DoptCLI(
        LightningModule,  # any data module may be named, none need be: a module may bring its own loaders
        subclass_mode_model=True,
        save_config_kwargs={"overwrite": True},
        args=list(arguments) if arguments is not None else None,
    )


# ---------------------------------------------------------------------- our own commands


def list_command(arguments: Sequence[str]) -> str:
    """``dopt list``."""
    _OneLine(prog="dopt list", description="All methods with their papers, and all parts.").parse_args(list(arguments))
    return show.listing(NAMES, WITHOUT_PLAN)


def describe_command(arguments: Sequence[str]) -> str:
    """``dopt describe``."""
    name, parser = _method_parser("describe", arguments)
    parser.add_argument(
        "--mbit", type=float, default=0.0, help="choose how messages travel for such a bandwidth, in Mbit/s"
    )
    parser.add_argument("--ms", type=float, default=0.0, help="and such a one-way latency, in milliseconds")
    plan, given, shapes, buffers = _parsed(name, parser, arguments[1:])
    chosen = {key: given[f"plan.{key}"] for key in inspect.signature(show.method(name)).parameters}
    link = Link(given["mbit"], given["ms"])
    return show.description(name, chosen, plan, shapes, buffers, given["n"], given["steps"], link)


def simulate_command(arguments: Sequence[str]) -> str:
    """``dopt simulate``."""
    name, parser = _method_parser("simulate", arguments)
    parser.add_argument("--mbit", type=float, default=0.0, help="bandwidth per worker in Mbit/s, 0 for unlimited")
    parser.add_argument("--ms", type=float, default=0.0, help="one-way latency in milliseconds")
    parser.add_argument(
        "--step-seconds", type=float, default=0.1, help="seconds of one inner step, of the median worker"
    )
    parser.add_argument(
        "--spread",
        type=float,
        default=0.0,
        help="how unequally fast the workers are: standard deviation of the logarithm of their step times (log-normal)",
    )
    parser.add_argument(
        "--link-spread",
        type=float,
        default=0.0,
        help="how unequally fast the links are: standard deviation of the logarithm of their bandwidths, --mbit being the median",
    )
    parser.add_argument(
        "--lr", type=float, help="peak of a cosine schedule, for methods that read the learning rate (qsr)"
    )
    plan, given, shapes, buffers = _parsed(name, parser, arguments[1:])
    for option, value in (("--spread", given["spread"]), ("--link-spread", given["link_spread"])):
        if not 0 <= value < 5:
            raise BadInputError(f"{option}={value:g}: must be a number in [0, 5)")
    if given["link_spread"] and not given["mbit"]:
        raise BadInputError(f"--link-spread={given['link_spread']:g}: spreads a bandwidth, which --mbit sets")
    seconds = spread(given["step_seconds"], given["spread"], given["n"])
    speeds = spread(given["mbit"], given["link_spread"], given["n"], seed=1)
    slow = [Link(speeds, given["ms"])] if isinstance(speeds, float) else [Link(mbit, given["ms"]) for mbit in speeds]
    link = slow[0] if len(slow) == 1 else slow
    return show.simulation(name, plan, shapes, buffers, given["n"], given["steps"], link, seconds, given["lr"])


def spread(median: float, sigma: float, n: int, seed: int = 0) -> float | list[float]:
    """Step times or bandwidths: the quantiles ``(i + 1/2) / n`` of a log-normal distribution, dealt out in a fixed order."""
    if sigma == 0.0:
        return median
    normal = NormalDist()
    times = [median * math.exp(sigma * normal.inv_cdf((rank + 0.5) / n)) for rank in range(n)]
    return random.Random(seed).sample(times, n)


def topology_command(arguments: Sequence[str]) -> str:
    """``dopt topology``."""
    name, rest = _name("topology", arguments, list(show.parts()["topologies"]))
    cls = show.graph(name)
    parser = _OneLine(prog=f"dopt topology {name}", description=show.title(cls))
    parser.add_class_arguments(cls, "graph")
    parser.add_argument("-n", type=int, required=True, help="number of workers")
    parser.add_argument("--plot", type=str, help="also draw it into this file (.png or .svg)")
    parser.add_argument("--lambda", type=str, help=f"also compare strategies for weighted ranks: {_LAMBDA}")
    parser.add_argument(
        "--lambda-rule",
        type=NodeRule,
        default="metropolis",
        help="how weighted mixing weighs links (NodeWeighted's rule)",
    )
    given = parser.parse_args(_prefixed(cls, "graph", rest))
    made = parser.make(given).graph
    text = show.topology_text(made, given.n)
    if given["lambda"] is not None:
        text += f"\n\n{_weighted(made, given.n, given['lambda'], given.lambda_rule)}"
    return text if given.plot is None else f"{text}\n  drawn in             {topology.draw(made, given.n, given.plot)}"


_LAMBDA = "'uniform', 'degree' (as many as it has neighbours), or one number per rank, 'a,b,...' or in a file"


def _weighted(graph: Topology, n: int, spec: str, rule: NodeRule) -> str:
    """The report on weighted ranks; whatever is wrong with it, it is ``--lambda`` that asked for it."""
    try:
        return show.weighted_text(topology.weighted_report(graph, n, _weights(graph, n, spec), rule))  # type: ignore[arg-type]
    except ValueError as error:
        raise BadInputError(f"--lambda={spec}: {_line(str(error))}") from error


def _weights(graph: Topology, n: int, spec: str) -> list[float]:
    """The weights that ``--lambda`` describes: counts if all are whole numbers, shares of one otherwise.

    Raises:
        ValueError: it describes none.
    """
    if spec == "uniform":
        return [1.0] * n
    if spec == "degree":
        return [float(max(1, len(graph.neighbors(n, rank)))) for rank in range(n)]
    text = Path(spec).read_text() if Path(spec).is_file() else spec
    try:
        numbers = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"must be {_LAMBDA}; this is no list of numbers and no file") from None
    if len(numbers) != n:
        raise ValueError(f"has {len(numbers)} numbers for {n} workers; give one for every rank")
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError("all numbers must be positive and finite")
    if abs(math.fsum(numbers) - 1) > 1e-6 and not all(number.is_integer() for number in numbers):
        raise ValueError(
            f"sum to {math.fsum(numbers):g}; shares must sum to 1, and only whole numbers (counts) need not"
        )
    return numbers


def workers_command(arguments: Sequence[str]) -> int:
    """``dopt workers``; returns its exit status."""
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = _OneLine(
        prog="dopt workers",
        description="Workers of an elastic run, each started again when it dies: dopt workers -n 4 -- python train.py",
    )
    parser.add_argument("-n", type=count, required=True, help="workers to start here")
    parser.add_argument("--first", type=int, default=0, help="number of the first worker here")
    parser.add_argument("--total", type=count, help="workers on all machines, if there are others")
    parser.add_argument(
        "--lighthouse", type=str, help="address of a lighthouse that runs elsewhere, instead of one here"
    )
    parser.add_argument("--bind", type=str, default="0.0.0.0:29510", help="where a lighthouse here listens")
    parser.add_argument("--host", type=str, help="name under which others reach this machine")
    parser.add_argument("--min-workers", type=count, default=1, help="members that a round needs")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds that a round waits for a worker that is late")
    parser.add_argument("--dead-after", type=float, default=5.0, help="seconds without a sign of life")
    parser.add_argument("--max-restarts", type=int, default=100, help="how often each worker is started again")
    given = parser.parse_args(words[:cut])
    command = words[cut + 1 :]
    if not command:
        raise BadInputError("name what each worker runs, after --: dopt workers -n 4 -- python train.py")
    total = given.total if given.total is not None else given.first + given.n
    if given.first < 0 or given.first + given.n > total:
        raise BadInputError(
            f"--first={given.first} -n={given.n} --total={total}: workers are numbered from 0 to total - 1"
        )
    if given.max_restarts < 0 or not 0 < given.dead_after < math.inf or not 0 <= given.wait < math.inf:
        raise BadInputError("--max-restarts and --wait must be at least 0, --dead-after more than 0")
    if given.min_workers > total:
        raise BadInputError(f"--min-workers={given.min_workers}: there are only {total} workers")
    try:
        return supervise(
            command, given.n, given.first, total, given.lighthouse, given.bind, given.host, given.min_workers, given.wait,
            given.dead_after, given.max_restarts,
        )  # fmt: skip
    except ImportError as error:
        raise BadInputError(f"needs torchft, pip install 'lightning_dopt[elastic]' ({error})") from error
    except (OSError, RuntimeError) as error:
        raise BadInputError(_line(str(error))) from error


def _name(command: str, arguments: Sequence[str], known: list[str]) -> tuple[str, list[str]]:
    """The name a command is about, and the other arguments."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: dopt {command} NAME [options]\n\nNAME is one of {', '.join(known)}")
        print(f"`dopt {command} NAME --help` explains the options")
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise BadInputError(f"name one of {', '.join(known)}")
    return arguments[0], list(arguments[1:])


def _method_parser(command: str, arguments: Sequence[str]) -> tuple[str, _OneLine]:
    name, _ = _name(command, arguments, list(show.methods()))
    function = show.method(name)
    parser = _OneLine(prog=f"dopt {command} {name}", description=show.title(function))
    parser.add_function_arguments(function, "plan")
    parser.add_argument("-n", type=int, default=8, help="number of workers")
    parser.add_argument("--parameters", type=count, help="number of model parameters, such as 10e6 (the default)")
    parser.add_subclass_arguments(nn.Module, "model", required=False, help="a model instead of --parameters")
    parser.add_argument("--steps", type=count, default=1000, help="optimizer steps")
    return name, parser


def _parsed(name: str, parser: _OneLine, arguments: Sequence[str]) -> tuple[Plan, Any, dict[str, tuple[int, ...]], int]:
    """The plan, all options, and the shapes and buffers of the model."""
    function = show.method(name)
    given = parser.parse_args(_prefixed(function, "plan", arguments))
    if getattr(given, "model", None) is not None and given.parameters is not None:
        raise BadInputError("give either --parameters or --model")
    with torch.device("meta" if getattr(given, "model", None) is not None else "cpu"):  # a model's shapes are enough
        made = parser.make(given)
    shapes, buffers = square_layers(given.parameters or 10_000_000), 0
    if getattr(given, "model", None) is not None:
        shapes, buffers = show.shapes_of(made.model)
    chosen = made.get("plan")  # a method may have no options
    return function(**(vars(chosen) if chosen else {})), made, shapes, buffers


def _prefixed(made: Callable[..., object], group: str, arguments: Sequence[str]) -> list[str]:
    """Arguments, those of a method or topology moved into their group, and short names of parts made class paths."""
    mine = set(inspect.signature(made).parameters)
    result: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        before = result[-1] if result else ""
        if option.startswith("--") and option[2:].partition(".")[0] in mine:
            argument = f"--{group}.{option[2:]}{equals}{_path(option, value)}"
        elif before.startswith(f"--{group}.") and "=" not in before:
            argument = _path(before, argument)
        result.append(argument)
    return result


def _path(option: str, value: str) -> str:
    """The class path of a topology or codec given by its short name; any other value as it is."""
    kind = {"codec": "codecs", "topology": "topologies"}.get(option.rpartition(".")[2].removeprefix("--"))
    if kind is None or not value.isidentifier() or value in ("None", "null"):
        return value
    for name, cls in show.parts()[kind].items():
        if value in (name, cls.__name__):
            return f"{cls.__module__}.{cls.__qualname__}"
    raise BadInputError(f"{option}={value}: must be one of {', '.join(show.parts()[kind])}, or a class path")


def count(text: str) -> int:
    """A positive whole number, also as ``10e6``."""
    number = float(text)
    if number < 1 or number != int(number):
        raise ValueError("must be a whole number of at least 1")
    return int(number)


def _line(message: str) -> str:
    """One line; of what a parser says about alternatives, only what concerns the one that was meant."""
    text = " ".join(message.split())
    if "Union subtypes" in text:
        text = re.sub(r" ?Given value type: .*", "", text)
        text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: ?", "", text)
        text = re.sub(
            r"- (Expected a <class '(NoneType|str)'>|Expected a path but .*? not accessible or invalid) ?", "", text
        )
    return re.sub(r":( -)+ ", ": ", re.sub(r'Parser key "(.*?)":', r"\1:", text)).strip(" -")


COMMANDS: dict[str, Callable[[Sequence[str]], str]] = {
    "list": list_command,
    "describe": describe_command,
    "simulate": simulate_command,
    "topology": topology_command,
}


def run(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Raises:
        BadInputError: it cannot be done.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = words[0] if words else None
    if command in ("-h", "--help"):
        print(HELP)
    elif command in LIGHTNING:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # class paths such as recipes.llm.ByteGPT
        train(arguments)
    elif command == "workers":
        raise SystemExit(workers_command(words[1:]))
    elif command in COMMANDS:
        sys.path.insert(0, os.getcwd())
        try:
            print(COMMANDS[command](words[1:]))
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise BadInputError(_line(str(error))) from error
    else:
        what = "a command is needed" if command is None else f"unknown command {command!r}"
        raise BadInputError(f"{what}: one of {', '.join((*LIGHTNING, *COMMANDS, 'workers'))}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script; bad input ends with one line on stderr and status 2."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        run(arguments)
    except BadInputError as error:
        command = f" {words[0]}" if words and words[0] in (*LIGHTNING, *COMMANDS, "workers") else ""
        print(f"dopt{command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
