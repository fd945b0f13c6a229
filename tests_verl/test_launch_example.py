"""examples/verl_launch.yaml under verl's own configuration, and the launch line as Hydra reads it."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from verl.utils.config import omega_conf_to_dataclass, validate_config

from tokenpo.errors import MissingInputError
from tokenpo.integrations.verl.config import PolicyLossConfig

EXAMPLE = Path(__file__).parents[1] / "examples" / "verl_launch.py"
compose = runpy.run_path(str(EXAMPLE), run_name="verl_launch")["compose"]


def test_it_composes_over_verls_configuration():
    config, lines = compose(["trainer.nnodes=4"])
    assert [line.split(":")[0] for line in lines] == ["estimator tokenpo", "objective tokenpo_ppo_clip"]
    assert "ktae, a3po; reads tokens, old_logps" in lines[0]
    assert config.trainer.nnodes == 4 and config.actor_rollout_ref.rollout.n == 8
    assert config.actor_rollout_ref.rollout.response_length == 3072  # what verl derives follows
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor.policy_loss, PolicyLossConfig) and actor.policy_loss.tokenpo == {"clip_high": 0.28}
    validate_config(config, use_reference_policy=False, use_critic=False)


def test_what_cannot_work_is_refused():
    with pytest.raises(MissingInputError, match=r"trainer\.v1\.trainer_mode=tokenpo"):
        compose(["trainer.v1.trainer_mode=sync"])


def test_the_launch_line():
    """`--cfg job` composes as a run does and stops there."""
    words = ["--config-path", str(EXAMPLE.parent), "--config-name", "verl_launch", "trainer.nnodes=4", "--cfg", "job"]
    done = subprocess.run([sys.executable, "-m", "verl.trainer.main_ppo", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss_mode: tokenpo_ppo_clip" in done.stdout and "nnodes: 4" in done.stdout
