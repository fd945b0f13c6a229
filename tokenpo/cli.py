"""The command line: `tokenpo COMMAND`, of the commands below.

Help and checks come from the typed configurations of `tokenpo.commands`. A user's mistake is one sentence on
standard error and exit code 2.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tokenpo import __version__
from tokenpo.errors import InputError, TokenpoError
from tokenpo.methods import nearest

COMMANDS = {
    "train": "fine-tune a model on preference pairs:  tokenpo train [CONFIG.yaml] [key=value ...]",
    "rl": "online RL on TRL, with token advantages:  tokenpo rl [CONFIG.yaml] [key=value ...]",
    "reward": "models that score tokens:  tokenpo reward train | score | eval",
    "score": "per-token log-probs, KL and implicit rewards:  tokenpo score MODEL DATA --output FILE",
    "inspect": "heat maps of tokens and curves, one page:  tokenpo inspect [MODEL|RUN] [DATA] --credit NAME[,NAME]",
    "generate": "text from a model, sampled or searched for:  tokenpo generate FOLDER --prompt TEXT",
    "cache": "a reference that is computed once:  tokenpo cache build | verify | info",
    "export": "a run's model with a model card, to a folder or the hub:  tokenpo export RUN [--merge] [--push REPO]",
    "plan": "memory and time before anything loads:  tokenpo plan [rl] CONFIG.yaml --gpu 24GB [key=value ...]",
    "bench": "measured side by side:  tokenpo bench credit | losses",
    "methods": "what there is:  tokenpo methods [--json]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # recommends a kernel at every start
    try:
        return _run(words)
    except TokenpoError as error:
        print(f"tokenpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tokenpo: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print("usage: tokenpo COMMAND ...\n\n" + "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))
        print("\n`tokenpo COMMAND --help` lists a command's options.")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"tokenpo {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        raise InputError(f"unknown command '{command}'{nearest(command, COMMANDS)}")
    if command == "methods":
        from tokenpo.commands.listing import show

        if set(rest) - {"--json"}:
            raise InputError(f"methods takes --json and nothing else, got {' '.join(rest)}")
        show(as_json="--json" in rest)
    elif command == "train" and _task(rest) != "online":
        config = train_config(rest)  # before the imports below, which take seconds
        from tokenpo.commands.train import train

        train(config)
    elif command in ("train", "rl"):
        from tokenpo.commands.rl import rl

        rl(rl_config(rest))
    elif command == "cache":
        from tokenpo.commands.cache import run

        run(rest, train_config)
    elif command == "plan":
        from tokenpo.commands.plan import run as plan

        plan(
            rest, parse, lambda words: rl_config(words) if _task(words) == "online" else train_config(words), rl_config
        )
    elif command == "reward":
        _reward(rest)
    elif command == "bench":
        from tokenpo.commands.bench import bench

        bench(rest, lambda cls, name, given: parse(cls, name, _positional(given, ("config",))))
    elif command == "export":
        from tokenpo.commands.export import ExportConfig, export, words_of

        export(parse(ExportConfig, "export", _positional(words_of(rest), ("run",))))
    elif command == "inspect":
        from tokenpo.commands.inspect import InspectConfig, inspect

        inspect(parse(InspectConfig, "inspect", _positional(rest, ("model", "data"))))
    elif command == "score":
        from tokenpo.commands.score import ScoreConfig, score

        print(score(parse(ScoreConfig, "score", _positional(rest, ("model", "data")))))
    else:
        from tokenpo.commands.generate import GenerateConfig, generate

        generate(parse(GenerateConfig, "generate", _positional(rest, ("model",))))
    return 0


def _reward(words: list[str]) -> None:
    """`tokenpo reward train | score | eval`."""
    from tokenpo.commands import reward_config as configs

    known = {"train": configs.RewardConfig, "score": configs.RewardScoreConfig, "eval": configs.RewardEvalConfig}
    if not words or words[0] in ("-h", "--help"):
        print("usage: tokenpo reward train | score | eval ...\n\n`tokenpo reward train --help` lists its options.")
        return
    name, rest = words[0], words[1:]
    if name not in known:
        raise InputError(f"unknown command 'reward {name}'{nearest(name, known)}")
    if name == "train":
        config = reward_config(rest)  # before the imports below, which take seconds
        from tokenpo.commands.reward import train

        train(config)
    elif name == "score":
        from tokenpo.commands.reward_score import score

        print(score(parse(configs.RewardScoreConfig, "reward score", _positional(rest, ("model", "data")))))
    else:
        from tokenpo.commands.reward_score import evaluate

        evaluate(parse(configs.RewardEvalConfig, "reward eval", _positional(rest, ("model", "data"))))


def reward_config(words: list[str]) -> Any:
    """The configuration of `tokenpo reward train`; values that suit the embedded model and pairs underneath."""
    from tokenpo.commands.reward_config import EMBEDDED, EMBEDDED_READING, RewardConfig

    words = _positional(words, ("config",))
    found = parse(RewardConfig, "reward train", words)
    if found.model == "embedded" and found.train == "embedded":
        found = parse(RewardConfig, "reward train", words, defaults=EMBEDDED)
        usual = EMBEDDED_READING.get(str(found.reading.get("name")), {})
        found = dataclasses.replace(found, reading={**usual, **found.reading})
    return found


def _task(words: list[str]) -> str | None:
    """The task that the words name, or else the configuration file; nothing else is looked at."""
    words = _positional(words, ("config",))
    named = [word.partition("=")[2] for word in words if word.startswith("--task=")]
    named += [after for word, after in itertools.pairwise(words) if word == "--task"]
    named += [str(content["task"]) for _, content in _config_files(words) if "task" in content]
    if named and named[0] not in ("offline", "online"):
        raise InputError(f"task is offline or online, got '{named[0]}'")
    return named[0] if named else None


def train_config(words: list[str]) -> Any:
    """The configuration of `tokenpo train`; with the embedded model and data, values that suit them underneath."""
    from tokenpo.commands.config import TrainConfig, preset

    words = _positional(words, ("config",))
    found = parse(TrainConfig, "train", words)
    if found.model == "embedded" and found.train == "embedded":
        found = parse(TrainConfig, "train", words, defaults=preset(str(found.loss.get("name"))))
    return found


def rl_config(words: list[str]) -> Any:
    """The configuration of `tokenpo rl`; with an embedded model and its prompts, values that suit them underneath."""
    from tokenpo.commands.loading import EMBEDDED
    from tokenpo.commands.rl_config import RLConfig, preset
    from tokenpo.commands.rl_inputs import PROMPTS

    words = _positional(words, ("config",))
    found = parse(RLConfig, "rl", words)
    if found.model in EMBEDDED and found.prompts in ("embedded", *PROMPTS):
        found = parse(RLConfig, "rl", words, defaults=preset(found.model, str(found.objective.get("name"))))
    return found


def parse(cls: type, command: str, words: list[str], defaults: dict[str, Any] | None = None) -> Any:
    """A configuration from words of the command line and from --config FILE, which the words override."""
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"tokenpo {command}", description=(cls.__doc__ or "").strip(), exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of these settings.")
    parser.add_class_arguments(cls, as_group=False)
    if defaults:
        parser.set_defaults(defaults)
    known = [f.name for f in dataclasses.fields(cls)]
    _check_config_file(words, known)
    try:
        found = parser.parse_args(words)
    except ArgumentError as error:
        raise InputError(_one_sentence(str(error), known)) from error
    return cls(**{name: value for name, value in vars(found).items() if name in known})


def _positional(words: list[str], names: tuple[str, ...]) -> list[str]:
    """`FILE key=value --flag v` as flags only: leading bare words take `names`, key=value becomes --key=value."""
    out: list[str] = []
    left = list(names)
    for i, word in enumerate(words):
        takes_value = i > 0 and words[i - 1].startswith("--") and "=" not in words[i - 1]
        if word.startswith("-") or takes_value:
            out.append(word)
        elif re.match(r"[A-Za-z_][\w.]*=", word):
            out.append(f"--{word}")
        elif left:
            out.append(f"--{left.pop(0)}={word}")
        else:
            raise InputError(f"what is '{word}'? settings are written key=value or --key value")
    return out


def _check_config_file(words: list[str], known: list[str]) -> None:
    """A YAML file that cannot be read, or has a key that does not exist, is named before it is parsed."""
    for path, content in _config_files(words):
        for key in content:
            if str(key).partition(".")[0] not in known:
                raise InputError(f"the configuration {path} has an unknown key '{key}'{nearest(str(key), known)}")


def _config_files(words: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and content of every --config among the words."""
    import yaml

    for i, word in enumerate(words):
        name, _, path = word.partition("=")
        if name != "--config":
            continue
        path = path or (words[i + 1] if i + 1 < len(words) else "")
        try:
            with open(path, encoding="utf-8") as file:
                content = yaml.safe_load(file)
        except OSError as reason:
            raise InputError(f"cannot read the configuration {path}: {reason.strerror}") from reason
        except UnicodeDecodeError as reason:
            raise InputError(f"the configuration {path} is not UTF-8: byte {reason.start}") from reason
        except yaml.YAMLError as reason:
            mark = getattr(reason, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            raise InputError(
                f"the configuration {path} is not YAML{where}: {getattr(reason, 'problem', reason)}"
            ) from reason
        if content is not None and not isinstance(content, dict):
            raise InputError(f"the configuration {path} must be a mapping of settings, not {type(content).__name__}")
        yield path, content or {}


def _one_sentence(message: str, known: list[str]) -> str:
    """The parser's message, which may run over many lines, as one."""
    unknown = re.search(r"unrecognized arguments: --?([\w.\-]+)", message)
    if unknown:
        name = unknown[1].partition(".")[0].replace("-", "_")
        return f"there is no setting '{name}'{nearest(name, known)}"
    key = re.search(r'Parser key "([\w.]+)"', message)
    expected = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[([^\]]+)\]|([^.\n]+))", message)
    given = re.findall(r"(?:Got value|Given value): (.*)", message)
    if key and expected:
        kinds = " or ".join(dict.fromkeys("".join(kind) for kind in expected)).replace("NoneType", "null")
        return f"{key[1]} must be {kinds}" + (f", got {given[-1]}" if given else "")
    return " ".join(message.split())


if __name__ == "__main__":
    sys.exit(main())
