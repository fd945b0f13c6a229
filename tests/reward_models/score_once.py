"""Token values and scores of a folder on fixed rows, to a file: score_once.py FOLDER OUT."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import make_pairs, make_tokenizer

from tokenpo.data import PreferenceCollator, load_preferences, tokenize_preferences
from tokenpo.reward_models import RewardModel


def batch():
    rows = tokenize_preferences(load_preferences(make_pairs(5)), make_tokenizer())
    return PreferenceCollator(pad_token_id=0)([rows[i] for i in range(5)])


def numbers(model):
    return {
        "values": model.token_values(batch()),
        "rewards": model.token_rewards(batch()),
        "scores": model.scores(batch()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save([numbers(RewardModel.from_pretrained(folder)) for folder in sys.argv[2:]], sys.argv[1])
