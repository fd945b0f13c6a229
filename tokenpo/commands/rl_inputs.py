"""What `tokenpo rl` is given by name: rewards, final answers, token rewards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from tokenpo.commands.config import loader
from tokenpo.commands.loading import EMBEDDED, first_line, model_folder
from tokenpo.commands.rl_config import RLConfig
from tokenpo.errors import InputError
from tokenpo.methods import nearest

SCORED = 16
"""Responses that a reward model reads at a time."""
ANSWERS = ("text", "math-verify")
PROMPTS = {"embedded-digits": "right_digits", "embedded-reviews": "true_reward"}
"""Prompts inside the package, and what judges the answers."""


def available(config: RLConfig) -> set[str]:
    """Names of what the run can give to estimators, credit and objective. Needs TRL."""
    from tokenpo.integrations.sampling import make_sampling
    from tokenpo.integrations.scoring import available

    given = {*make_sampling(config.sampling).gives}
    given |= {"dpo_logps"} if "dpo" in (config.credit or {}) else set()
    given |= {"answer_ids"} if config.answers else set()
    return available(given, config.credit is not None, config.critic is not None, config.correct_above is not None,
                     config.reference)  # fmt: skip


def prompts_name(config: RLConfig) -> str:
    """`prompts`; 'embedded' is what the embedded model answers."""
    if config.prompts != "embedded":
        return config.prompts
    if config.model not in EMBEDDED:
        raise InputError(f"prompts: name what {config.model} shall answer: a file, or {' or '.join(PROMPTS)}")
    return "embedded-digits" if config.model == "embedded-digits" else "embedded-reviews"


def reward_name(config: RLConfig) -> str:
    """`reward`; the embedded one is that of the prompts."""
    if config.reward != "embedded":
        return config.reward
    found = PROMPTS.get(prompts_name(config))
    if found is None:
        raise InputError(
            f"the embedded reward judges embedded prompts only: name the reward of {config.prompts}, module:function, "
            "math-verify, reasoning-gym, or a reward model's folder"
        )
    return found


def reward_function(name: str) -> Callable[..., Any]:
    """A function in TRL's signature; a reward model reads the text in tokens of its own."""
    from tokenpo.evaluation import scorers

    if name == "true_reward":
        from tokenpo.data.reviews import true_reward

        def of_reviews(completions: list[Any], **_: Any) -> list[float]:
            return [true_reward(_text(completion)) for completion in completions]

        return of_reviews
    if name == "right_digits":
        from tokenpo.data.problems import is_right

        return is_right
    if name in scorers.SCORERS:
        scorers.SCORERS[name]([])  # says now which package it lacks
    if name in scorers.SCORERS or Path(name).is_dir():
        return scorers.reward_function(name, max_length=None, batch_size=SCORED)
    if not name.partition(":")[2]:
        raise InputError(
            f"reward '{name}' is neither true_reward nor right_digits, nor {' nor '.join(scorers.SCORERS)}, nor "
            "module:function, nor the folder of a reward model"
        )
    return named("reward", name)


def answer_function(name: str | None) -> Callable[..., Any] | None:
    """Rollouts to a final answer each, a string or None: what COPO compares. None where `name` is."""
    if name is None:
        return None
    if name == "math-verify":
        from tokenpo.evaluation.scorers import last_expressions

        last_expressions([])  # says now which package it lacks
        return lambda rollouts: last_expressions([_text(c) for c in rollouts.completions])
    if name == "text":
        return lambda rollouts: [_text(c).strip() for c in rollouts.completions]
    if not name.partition(":")[2]:
        raise InputError(f"answers '{name}' is neither {' nor '.join(ANSWERS)}, nor module:function")
    function = named("answers", name)

    def answers(rollouts: Any) -> list[str | None]:
        columns = {key: [row.get(key) for row in rollouts.rows] for key in rollouts.rows[0] if key != "prompt"}
        found = function(prompts=rollouts.prompts, completions=rollouts.completions, **columns)
        return [None if answer is None else str(answer) for answer in found]

    return answers


def check_credit(credit: dict[str, Any] | None, available: Collection[str]) -> Sequence[str]:
    """What the credit method reads; refused are an unknown one, or one that reads what the run does not have."""
    from tokenpo.integrations.rollouts import credit_function

    if credit is None:
        return ()
    if "dpo" in credit:
        model_folder(str(credit["dpo"]))
    _, needs = credit_function({key: value for key, value in credit.items() if key != "dpo"})
    for need in needs:
        if need not in available:
            remedy = "give dpo, the folder of a DPO model" if need == "dpo_logps" else "take another method"
            raise InputError(f"credit '{credit['name']}' needs '{need}', which is not available: {remedy}")
    return needs


def inputs(config: RLConfig) -> dict[str, Any]:
    """The trainer's `credit` and `inputs`: `answer_ids` of `answers`, `dpo_logps` of the model that credit names."""
    import torch

    from tokenpo.integrations.rollouts import logps_under

    found: dict[str, Any] = {}
    answers = answer_function(config.answers)
    if answers is not None:
        found["answer_ids"] = answers
    given = dict(config.credit or {})
    folder = given.pop("dpo", None)
    if folder is not None:
        judge = loader(config)(str(folder)).requires_grad_(False)  # type: ignore[arg-type]
        judge.to("cuda" if torch.cuda.is_available() else "cpu")
        found["dpo_logps"] = logps_under(judge, temperature=config.temperature)
    return {"credit": given or None, "inputs": found}


def named(field: str, name: str) -> Callable[..., Any]:
    """The function `module:function`."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as reason:
        raise InputError(f"{field}: cannot import {module}: {first_line(reason)}") from reason
    if not callable(found):
        known = dir(importlib.import_module(module))
        raise InputError(f"{field}: {module} has no function '{attribute}'{nearest(attribute, known)}")
    return found


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
