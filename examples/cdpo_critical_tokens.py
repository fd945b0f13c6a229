"""cDPO from rollouts: sample, verify, contrast a model of right answers with one of wrong ones, train on the blame.

What          the model's own samples are sorted by a verifier; two SFT copies learn right and wrong answers; where they
              part, a rejected token counts more. A few wrong answers are checked against the definition by rollouts:
              the token after which nothing ends well
Paper         Critical Tokens Matter, https://arxiv.org/abs/2411.19943
Simplified    "right" is a review without a bad word, so what is to blame is known; all weights where the authors train
              adapters; any pairs where they take the most frequent answers
CPU toy       python examples/cdpo_critical_tokens.py
One GPU       python examples/cdpo_critical_tokens.py --model FOLDER --tokens 512 --per-prompt 64 --steps 500 \
              --pairs 4 --sft-lr 1e-5 --lr 1e-6, with `is_correct` and PROMPTS replaced by your verifier and questions
Several GPUs  accelerate launch --multi_gpu --num_processes 8 examples/cdpo_critical_tokens.py (and the same arguments)
"""

import argparse
import copy
import functools
import json
import statistics

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tokenpo.credit import contrastive_scores, critical_weights
from tokenpo.data import PreferenceCollator, load_preferences, tokenize_preferences
from tokenpo.data.reviews import WORD, WORTHS, embedded_model_path, prompts, token_credit
from tokenpo.evaluation import auroc, critical_token, generate
from tokenpo.statistics import LinearHead, at_responses, hidden_before_head
from tokenpo.training import PreferenceTrainer

PROMPTS = prompts()


def is_correct(prompt, text):
    return all(WORTHS.get(word.lower(), 0.0) >= 0 for word in WORD.findall(text))


def answers(model, tokenizer, args, seed):
    """Prompt -> (right answers, wrong answers), sampled."""
    asked = PROMPTS * args.per_prompt
    ids = generate(model, tokenizer, asked, max_new_tokens=args.tokens, seed=seed)
    found = {prompt: ([], []) for prompt in PROMPTS}
    for prompt, text in zip(asked, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
        if text.strip():
            found[prompt][not is_correct(prompt, text)].append(text)
    return found


def share_right(found):
    return sum(len(right) for right, _ in found.values()) / max(1, sum(len(r) + len(w) for r, w in found.values()))


def train(policy, loss, pairs, tokenizer, args, lr, **loss_args):
    settings = TrainingArguments(
        f"runs/examples/{loss}", max_steps=args.steps, per_device_train_batch_size=args.pairs, learning_rate=lr,
        lr_scheduler_type="linear", warmup_steps=0.2, logging_steps=max(1, args.steps // 2), save_strategy="no",
        report_to="none", disable_tqdm=True, bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = PreferenceTrainer(
        policy, settings, train_dataset=pairs, tokenizer=tokenizer, loss=loss, loss_args=loss_args
    )
    trainer.train()
    return trainer


@torch.no_grad()
def with_weights(rows, positive, negative, batch_size=32):
    """`rows` with 1 - s on rejected tokens, s low where the two models part; chosen tokens count 1, unread."""
    weights, collate = [], PreferenceCollator(pad_token_id=0)
    heads = [LinearHead.of(model) for model in (positive, negative)]
    for first in range(0, len(rows), batch_size):
        both = collate([rows[i] for i in range(first, min(first + batch_size, len(rows)))])
        batch = {name: value[len(value) // 2 :].to(positive.device) for name, value in both.items()}
        states = [at_responses(hidden_before_head(model, batch), batch) for model in (positive, negative)]
        steps = torch.arange(states[0].shape[1], device=positive.device)
        mask = steps < batch["response_lengths"][:, None]
        columns = (batch["prompt_lengths"][:, None] + steps).clamp(max=batch["input_ids"].shape[1] - 1)
        for *hidden, ids, kept in zip(*states, batch["input_ids"].gather(1, columns), mask, strict=True):
            logits = [head.logits(h[kept])[None] for head, h in zip(heads, hidden, strict=True)]  # of one row at a time
            scores = contrastive_scores(*logits, ids[kept][None], kept[kept][None])
            weights.append(critical_weights(scores, kept[kept][None])[0].tolist())
    rows = rows.add_column("chosen_token_weights", [[1.0] * len(ids) for ids in rows["chosen_ids"]])
    return rows.add_column("rejected_token_weights", weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model_path()))
    parser.add_argument("--tokens", type=int, default=64, help="length limit of an answer")
    parser.add_argument("--per-prompt", type=int, default=16, help="answers sampled a prompt")
    parser.add_argument("--steps", type=int, default=40, help="of each of the three trainings")
    parser.add_argument("--pairs", type=int, default=16, help="pairs a step and process")
    parser.add_argument("--sft-lr", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--checked", type=int, default=2, help="wrong answers whose critical token rollouts look for")
    parser.add_argument("--rollouts", type=int, default=16, help="completions of every prefix of these")
    parser.add_argument("--write", default=None, help="write the pairs as JSONL for `tokenpo train`, and train nothing")
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # tiny models run best on one

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    start = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    start.to(PartialState().device)
    found = answers(start, tokenizer, args, seed=0)
    pairs = [
        {"prompt": prompt, "chosen": right[i % len(right)], "rejected": text}
        for prompt, (right, wrong) in found.items() if right for i, text in enumerate(wrong)
    ]  # fmt: skip
    if args.write:
        if PartialState().is_main_process:
            load_preferences(pairs).to_json(args.write)
        return
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    rows, of_wrong = (tokenize_preferences(load_preferences(part), tokenizer) for part in (pairs, swapped))
    positive, negative, policy = (copy.deepcopy(start) for _ in range(3))
    train(positive, "sft", rows, tokenizer, args, args.sft_lr)
    train(negative, "sft", of_wrong, tokenizer, args, args.sft_lr)
    rows = with_weights(rows, positive, negative)
    trainer = train(policy, "critical_dpo", rows, tokenizer, args, args.lr, gamma=args.gamma)

    weights = [torch.tensor(row) for row in rows["rejected_token_weights"]]
    texts = zip(rows["rejected_text"], rows["rejected_spans"], strict=True)
    worths = torch.tensor([worth for text, spans in texts for worth in token_credit(text, spans)])
    told = worths != 0  # among words of worth: that these are less probable than others would tell them from the rest
    ranks = []
    for i in sorted(range(len(rows)), key=lambda i: len(weights[i]))[: args.checked]:
        at = critical_token(
            start, tokenizer, pairs[i]["prompt"], rows[i]["rejected_ids"],
            functools.partial(is_correct, pairs[i]["prompt"]), rollouts=args.rollouts, max_new_tokens=args.tokens,
        )  # fmt: skip
        if at >= 0:
            ranks.append((weights[i] <= weights[i][at]).float().mean().item())
    numbers = {
        "right_before": share_right(found),
        "right_after": share_right(answers(policy, tokenizer, args, seed=1)),
        "pairs": float(len(pairs)),
        "weight_auroc_bad_from_good": float(auroc(torch.cat(weights)[told], worths[told] < 0)),
        "critical_found": len(ranks) / max(args.checked, 1),
        "critical_weight_rank": statistics.fmean(ranks) if ranks else 0.5,
    }
    if trainer.is_world_process_zero():
        print("\n".join(f"{name:24} {value:.3f}" for name, value in numbers.items()))
        print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
