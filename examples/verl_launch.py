"""verl on Ray: a configuration, its launch line, and a check of both before any GPU starts.

What          verl_launch.yaml puts KTAE, A3PO and a clip by name over verl's own configuration; this script checks it,
              shows on four made-up rollouts what the estimator does, and prints the line; --run starts it
Paper         KTAE, https://arxiv.org/abs/2505.16826; A3PO, https://arxiv.org/abs/2512.21625
Simplified    without verl installed the names, their order and hyperparameters are checked; in verl's environment the
              whole configuration is composed too. The run itself needs GPUs (docs/verl.md)
CPU toy       python examples/verl_launch.py
One GPU       python examples/verl_launch.py --run trainer.n_gpus_per_node=1 actor_rollout_ref.model.path=FOLDER \
              data.train_files=train.parquet data.val_files=test.parquet data.train_batch_size=64
Several GPUs  python examples/verl_launch.py --run (one node of eight); for four nodes `ray start --head` on the first,
              `ray start --address=HEAD:6379` on the others, then the same with trainer.nnodes=4 on the first
"""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml

from tokenpo.integrations.verl.fields import PLAIN, TRANSFERRED, Step, during
from tokenpo.integrations.verl.functions import composition, estimator, objective_function

CONFIG = Path(__file__).with_suffix(".yaml").resolve()


def check_names(config):
    """The list of advantages as one function; raises InputError for names, orders and numbers that cannot work."""
    algorithm, loss = config["algorithm"], config["actor_rollout_ref"]["actor"]["policy_loss"]
    objective_function(loss["loss_mode"], loss["tokenpo"])
    return composition(algorithm["adv_estimator"], algorithm["tokenpo"], (*PLAIN, *TRANSFERRED, "step"))


def compose(overrides):
    """verl's configuration under ours, composed by Hydra as verl does it, and what our check says of it."""
    from hydra import compose as compose_config
    from hydra import initialize_config_dir

    from tokenpo.integrations.verl.check import check

    with initialize_config_dir(str(CONFIG.parent), version_base=None):
        config = compose_config(CONFIG.stem, overrides=overrides)
    return config, check(config)


def toy_advantages(made):
    """Advantages of two right rollouts, which hold token 7, and of two wrong ones, which do not."""
    tokens = torch.tensor([[7, 5, 6], [5, 7, 6], [5, 8, 6], [9, 5, 6]])
    mask = torch.ones_like(tokens)
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0])
    scores = torch.zeros(4, 3)
    scores[:, -1] = rewards  # verl puts the reward on the last token
    known = {"tokens": tokens, "old_logps": torch.full((4, 3), -1.0), "step": 0}
    with during(Step(made, known)):
        advantages, _ = estimator("tokenpo")(scores, mask, config={}, index=np.array(["one prompt"] * 4, dtype=object))
    return tokens, advantages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="start it, instead of printing the line")
    parser.add_argument("overrides", nargs="*", help="of verl's configuration: trainer.nnodes=4")
    args = parser.parse_args()

    config = yaml.safe_load(CONFIG.read_text())
    made = check_names(config)
    if importlib.util.find_spec("verl") is not None:
        config, lines = compose(args.overrides)
        print("\n".join(lines))
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", str(CONFIG.parent), "--config-name",
               CONFIG.stem, *args.overrides]  # fmt: skip
    print(shlex.join(command))
    if args.run:
        raise SystemExit(subprocess.run(command).returncode)

    data, actor = config["data"], config["actor_rollout_ref"]["actor"]
    rollouts = data["train_batch_size"] * config["actor_rollout_ref"]["rollout"]["n"]
    tokens, advantages = toy_advantages(made)
    right = advantages[:2]
    numbers = {
        "rollouts_per_step": rollouts,
        "updates_per_step": data["train_batch_size"] // actor["ppo_mini_batch_size"],
        "response_tokens_at_most": rollouts * data["max_response_length"],
        "advantage_key_token": right[tokens[:2] == 7].mean().item(),
        "advantage_other_tokens": right[tokens[:2] != 7].mean().item(),
    }
    print("\n".join(f"{name:24} {value:.3f}" for name, value in numbers.items()))
    print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
