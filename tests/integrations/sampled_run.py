"""Runs that sample for themselves, the same rows in one process and in two (as a program: sampled_run.py FOLDER)."""

from collections import Counter

import torch
from rl_run import PROMPTS, begin, config, leave, rows, run, vowels
from tiny import make_model
from transformers import LogitsProcessor

from tokenpo.errors import InputError
from tokenpo.integrations.rollouts import gathered_objects
from tokenpo.integrations.sampling import processed
from tokenpo.integrations.trl import TokenGRPOTrainer

DULL = PROMPTS[:4]


def gumbel(seed, size):
    return -torch.empty(size).exponential_(generator=torch.Generator().manual_seed(seed % 2**31)).log()


class Noise(LogitsProcessor):
    """Samples by noise that follows from the number of a row and its tokens so far, wherever the row stands.

    The end is likelier than the model says, so that lengths and trees differ.
    """

    def __init__(self, numbers):
        self.numbers = numbers

    def __call__(self, input_ids, scores):
        rows = zip(input_ids.tolist(), self.numbers, strict=True)
        noise = torch.stack([gumbel(hash((number, *filter(None, row))), scores.shape[1]) for row, number in rows])
        noise[:, 2] += 1.5
        taken = (scores.log_softmax(-1) + noise).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, taken, 0.0)


class Repeatable(TokenGRPOTrainer):
    """Samples by `Noise`, and keeps every row of this process, and what AAPO asked for."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.kept, self.asked, self.seen = [], [], Counter()

    def continued(self, beginnings, limits):
        self.seen = Counter()
        return super().continued(beginnings, limits)

    def _generate_single_turn(self, prompt_ids, images, fields, num_generations, *more):
        """Rows of a prompt are numbered over all processes; every process continues prefixes of its own."""
        asked, everywhere = [tuple(ids) for ids in prompt_ids], gathered_objects(prompt_ids)
        if num_generations > 1:
            self.seen = Counter()
        own = num_generations == 1 and self.sampling.chain is not None
        earlier = Counter(map(tuple, everywhere[: 0 if own else self.accelerator.process_index * len(asked)]))
        numbers = []
        for ids in asked:
            numbers.append(earlier[ids] + self.seen[ids])
            self.seen[ids] += 1
        with processed(self.accelerator.unwrap_model(self.model_wrapped), Noise(numbers)):
            return super()._generate_single_turn(prompt_ids, images, fields, num_generations, *more)

    def _ask_the_reference(self, aapo, prompts, inputs):
        self.asked.append(aapo.missing(prompts))
        super()._ask_the_reference(aapo, prompts, inputs)

    def _measure(self, rollouts, out):
        super()._measure(rollouts, out)
        self.rollouts = rollouts

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        rewards = self.rollouts.rewards.tolist()
        for i, of in enumerate(out["completion_mask"].bool()):
            self.kept.append({
                "step": self.state.global_step, "drawn": inputs[i]["prompt"], "prompt": self.rollouts.prompts[i],
                "group": int(out["group_id"][i]), "tokens": out["completion_ids"][i][of].tolist(),
                "reward": None if rewards[i] != rewards[i] else rewards[i],
                "loss_mask": out["loss_mask"][i][of].tolist(), "advantages": out["advantages"][i][of].tolist(),
            })  # fmt: skip
        return out


def some(prompts, completions, **kwargs):
    """The share of vowels, never 0, and equal for some prompts."""
    return [0.5 if p in DULL else 1 + share for p, share in zip(prompts, vowels(completions), strict=True)]


def lively(completions, **kwargs):
    return [1 + share for share in vowels(completions)]


TREE = {"name": "spo_tree", "branching": [2, 2], "segment": 3}
RUNS = {
    "chain": {"advantages": [{"name": "spo_chain", "threshold": 0.1, "interval": 2}],
              "objective": {"name": "spo", "kl_coef": 0.0}, "sampling": [{"name": "spo_chain", "rollouts": 2}]},
    "groups": {"sampling": [{"name": "dynamic_sampling", "attempts": 2}], "reward": some},
    "tree": {"advantages": ["spo_tree", "spo_tree_kept", "whiten"], "objective": "spo", "sampling": [TREE]},
    "aapo": {"advantages": ["aapo"], "objective": "reinforce", "data": rows(4), "reference": "model:other",
             "load_reference": lambda folder: make_model(5)},
}  # fmt: skip
"""Trees need whole prompts in a process: two of eight rows. Of the others' three groups of four the second is cut."""


def sampled_run(folder, name, processes, size=None):
    """Three updates; a process has `size` rows a micro-batch, and two of them."""
    whole = {"num_generations": 8} if name == "tree" else {}
    size = size or (8 if whole else 6) // processes
    given = config(folder / name, per_device_train_batch_size=size, steps_per_generation=2, **whole)
    trainer, keep = run(given, cls=Repeatable, **{"reward": lively, **RUNS[name]})
    remembered = trainer.composition.state_dict() if name == "aapo" else {}
    return {
        "losses": keep.losses, "gradients": keep.gradients, "rows": trainer.kept, "asked": trainer.asked,
        "remembered": [part["reference"] for part in remembered.values()],
        "sampled": [{n: v for n, v in log.items() if n.startswith("sampling/")} for log in keep.logs],
    }  # fmt: skip


def cut_tree(folder):
    """What is said where the eight rows of a prompt are in two processes."""
    try:
        sampled_run(folder, "tree", 2, size=2)
    except InputError as reason:
        return str(reason)


if __name__ == "__main__":
    folder = begin()
    leave({"cut": cut_tree(folder / "cut"), **{name: sampled_run(folder, name, 2) for name in RUNS}}, folder)
