"""Steps of GRPO on the tiny model, for tests; as a program, in two processes: rl_run.py FOLDER LISTS."""

import faulthandler
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from datasets import Dataset
from tiny import make_model, make_tokenizer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tokenpo.integrations.trl import TokenGRPOTrainer

PROMPTS = ["say a:", "say bcd:", "tell:", "hey you:", "sing a song:", "go:", "why not:", "who is it:"]


class Keep(TrainerCallback):
    """Losses and gradients of every update."""

    def __init__(self):
        self.gradients, self.losses, self.logs = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.gradients.append({n.removeprefix("module."): gradient.clone() for n, gradient in found.items()})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.logs.append(dict(logs))


def vowels(completions, **kwargs):
    """The share of vowels."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def fixed_rollouts(prompts, trainer):
    """Responses of unequal length by prompt and place, so that every layout of processes has the same ones."""
    first = trainer.accelerator.process_index * len(prompts)
    completions = []
    for i, prompt in enumerate(prompts, first):
        generator = torch.Generator().manual_seed(i * 31 + len(prompt) + 7 * trainer.state.global_step)
        length = 2 + i % 5
        completions.append([*torch.randint(4, 30, (length,), generator=generator).tolist(), 2])
    ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * len(c) for c in completions]}


class Advantages(TokenGRPOTrainer):
    """Keeps the tokens and advantages of every row that this process trained on."""

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        self.kept = getattr(self, "kept", [])
        for tokens, mask, values in zip(out["completion_ids"], out["completion_mask"], out["advantages"], strict=True):
            of = mask.bool()
            self.kept.append([self.state.global_step, tokens[of].tolist(), values[of].tolist()])
        return out


def some_vowels(completions, **kwargs):
    """1 where a sixth or more are vowels, else 0."""
    return [float(share > 0.16) for share in vowels(completions)]


def config(folder, **options):
    usual = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 4, "max_completion_length": 8, "max_steps": 3, "learning_rate": 1e-2, "max_grad_norm": 0.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "optim": "sgd", "bf16": False, "lr_scheduler_type": "constant", "seed": 3, "activation_checkpointing": False,
    }  # fmt: skip
    return GRPOConfig(**{**usual, **options})


def rows(n=8):
    return Dataset.from_list([{"prompt": p} for p in PROMPTS[:n]])


def run(args, cls=TokenGRPOTrainer, model=None, reward=vowels, resume=None, data=None, **options):
    keep = Keep()
    trainer = cls(
        model or make_model(0), reward, args, train_dataset=data or rows(), processing_class=make_tokenizer(),
        callbacks=[keep], **options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, keep


def run_theirs(args, **options):
    return run(args, cls=GRPOTrainer, **options)


def fixed_runs(folder, lists, size):
    """Three updates of each list of options on `fixed_rollouts`, `size` rows a micro-batch, two of them a process."""
    found = {}
    for name, options in lists.items():
        given = config(folder / name, per_device_train_batch_size=size, steps_per_generation=2)
        trainer, keep = run(given, cls=Advantages, rollout_func=fixed_rollouts, reward=some_vowels, **options)
        found[name] = {"losses": keep.losses, "gradients": keep.gradients, "advantages": trainer.kept}
    return found


def in_two_processes(script, folder, *words):
    """What `script FOLDER WORDS` left with `leave` in the first process and in the second."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    given = [*launch, str(Path(__file__).parent / script), str(folder), *words]
    done = subprocess.run(given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def begin():
    """The folder of a program that `in_two_processes` started; a process that waits for ever says where, and ends."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(240, exit=True)
    return Path(sys.argv[1])


def leave(found, folder):
    """Keep what this process found, and end."""
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


def close_gradients(one, two, name, tolerance=1e-5):
    """Equal but for `tolerance`, relative to the largest entry of a step."""
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        largest = max(float(gradient.abs().max()) for gradient in a.values())
        assert max(float((a[n] - b[n]).abs().max()) for n in a) < tolerance * largest, name
    assert max(float(gradient.abs().max()) for step in one for gradient in step.values()) > 1e-2, name


if __name__ == "__main__":
    folder = begin()
    leave(fixed_runs(folder, json.loads(sys.argv[2]), 3), folder)
