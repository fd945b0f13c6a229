"""Rollouts beyond a response a row of the batch, on whatever TRL generates with; every token sampled is counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.data_utils import is_conversational

from tokenpo.advantages import dynamic_sampling, spo_cutpoints
from tokenpo.advantages.compose import Composition
from tokenpo.integrations.rewards import write_rollouts
from tokenpo.integrations.rollouts import Rollouts, gathered, gathered_objects
from tokenpo.integrations.sampling import Chain, Node, Sampling, tree_rows

Row = Mapping[str, Any]


class MoreRolloutsMixin:
    """For a GRPOTrainer with a `Sampling`: what it samples and how that is rewarded."""

    sampling: Sampling
    composition: Composition
    run_folder: Path
    keep_rollouts: int
    accelerator: Any
    args: Any
    model: Any
    state: Any
    train_dataset: Any
    processing_class: Any
    generation_config: Any
    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    eos_token_ids: list[int]
    reward_weights: Tensor
    _scored: Any
    _own: int | None
    _metrics: Any
    _step: int
    _pending_extra_logs: Any
    _pending_metrics: Any
    _generate_single_turn: Callable[..., Any]
    _tokenize_prompts: Callable[..., Any]
    _calculate_rewards: Callable[..., Tensor]

    @property
    def _spo_settings(self) -> dict[str, Any]:
        """Those of `spo_cutpoints` that the entry of spo_chain sets, {} without one."""
        estimator = self.composition.estimator
        given = getattr(estimator.function, "keywords", {}) if estimator.name == "spo_chain" else {}
        return {name: given[name] for name in ("threshold", "interval") if name in given}

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    # Sampling and judging any number of responses a process; all processes must ask together.

    def continued(self, beginnings: Sequence[list[int]], limits: Sequence[int]) -> tuple[list[list[int]], Any]:
        """Tokens sampled behind each beginning, at most `limits[i]` >= 1, and the engine's log-probs where it has some.

        The longest come first, so that rows of one call are of a length.
        """
        own, wanted = len(beginnings), max(gathered_objects([len(beginnings)]))
        asked = [*beginnings, *[[self.eos_token_ids[0]]] * (wanted - own)]
        most = [*limits, *[1] * (wanted - own)]
        order = sorted(range(wanted), key=lambda i: -most[i])
        size = self.args.per_device_train_batch_size * self.args.steps_per_generation
        tokens: list[list[int]] = [[] for _ in range(wanted)]
        logprobs: list[Any] = [None] * wanted
        for start in range(0, wanted, size):
            chunk = order[start : start + size]
            with self._at_most(most[chunk[0]]):
                ids, scores = self._generate_single_turn([asked[i] for i in chunk], None, {}, 1)
            for place, i in enumerate(chunk):
                tokens[i] = ids[place][: most[i]]
                logprobs[i] = None if scores is None else scores[place][: most[i]]
        return tokens[:own], None if None in logprobs[:own] else logprobs[:own]

    @contextmanager
    def _at_most(self, tokens: int) -> Iterator[None]:
        config = getattr(self, "generation_config", None)  # vLLM has none: what it makes beyond is cut
        if config is None:
            yield
            return
        usual, config.max_new_tokens = config.max_new_tokens, tokens
        try:
            yield
        finally:
            config.max_new_tokens = usual

    def judged(self, rows: Sequence[Row], responses: Sequence[list[int]], spare: Row) -> Tensor:
        """(n, functions) what the reward functions say, NaN where nothing. `spare`: a row to ask with where n is 0."""
        own, wanted = len(rows), max(gathered_objects([len(rows)]))
        filled = [*rows, *[rows[0] if rows else spare] * (wanted - own)]
        ids = [*responses, *[responses[0] if rows else self.eos_token_ids[:1]] * (wanted - own)]
        if not wanted:
            return torch.zeros(0, len(self.reward_weights))
        prompts = [row["prompt"] for row in filled]
        self._own = own
        try:
            with self._aside():
                found = self._calculate_rewards(filled, prompts, self.decoded(prompts, ids), ids)
        finally:
            self._own = None
        first = self.accelerator.process_index * wanted
        return found[first : first + own]

    def decoded(self, prompts: Sequence[Any], ids: Sequence[list[int]]) -> list[Any]:
        """Completions as reward functions get them."""
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        if not is_conversational({"prompt": prompts[0]}):
            return texts
        return [[{"role": "assistant", "content": text}] for text in texts]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What happens inside leaves no trace in metrics, logs and counters of the batch."""
        names = ("_metrics", "_pending_extra_logs", "_pending_metrics")
        before = {name: copy.deepcopy(getattr(self, name)) for name in names}
        scored, seen = getattr(self, "_scored", None), self.state.num_input_tokens_seen
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)
            self._scored, self.state.num_input_tokens_seen = scored, seen

    def weighted(self, of_functions: Tensor) -> Tensor:
        """(n,) sums of the functions' rewards by their weights; NaN where none gave any."""
        total = (of_functions * self.reward_weights.to(of_functions.device)).nansum(1)
        return torch.where(torch.isnan(of_functions).all(1), torch.nan, total)

    def _budget(self, **counts: int) -> None:
        """Metrics, summed over processes."""
        names = sorted(counts)
        everywhere = gathered_objects([[counts[n] for n in names]])
        for name, values in zip(names, zip(*everywhere, strict=True), strict=True):
            self._metrics["train"][f"sampling/{name}"].append(float(sum(values)))

    # SPO-chain.

    def chain_values(self, chain: Chain, rollouts: Rollouts) -> Tensor:
        """(B, T+1) `prefix_values` at the cuts of `spo_cutpoints`: mean rewards of fresh continuations, 0 elsewhere.

        Equal prefixes of a prompt share theirs. A continuation may run to the length limit of a response.
        """
        cuts = spo_cutpoints(rollouts.known["old_logps"], rollouts.mask, **self._spo_settings).nonzero().tolist()
        ids, lengths = rollouts.batch["input_ids"].tolist(), rollouts.batch["prompt_lengths"].tolist()
        groups = rollouts.group.tolist()
        places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for row, column in cuts:
            places.setdefault((groups[row], *ids[row][: lengths[row] + column]), []).append((row, column))
        first = [where[0] for where in places.values() for _ in range(chain.rollouts)]
        tails, _ = self.continued(
            [ids[row][: lengths[row] + column] for row, column in first],
            [self.max_completion_length - column for _, column in first],
        )
        responses = [ids[row][lengths[row] :][:column] + tail for (row, column), tail in zip(first, tails, strict=True)]
        found = self.weighted(self.judged([rollouts.rows[row] for row, _ in first], responses, rollouts.rows[0]))
        if chain.unfinished is not None:
            ended = torch.tensor([r[-1] in self.eos_token_ids for r in responses], device=found.device).bool()
            found = torch.where(ended | torch.isnan(found), found, chain.unfinished)
        means = found.reshape(-1, chain.rollouts).nanmean(1).nan_to_num(0.0)
        values = torch.zeros(len(rollouts.mask), rollouts.mask.shape[1] + 1, device=rollouts.mask.device)
        for where, value in zip(places.values(), means.tolist(), strict=True):
            for row, column in where:
                values[row, column] = value
        self._budget(prefixes=len(places), responses=len(first), tokens=sum(map(len, tails)))
        self._keep_continuations(first, responses, found.tolist(), rollouts)
        return values

    def _keep_continuations(
        self, first: Sequence[tuple[int, int]], responses: list[list[int]], rewards: list[float], rollouts: Rollouts
    ) -> None:
        if not self.keep_rollouts or not responses or not self.accelerator.is_main_process:
            return
        texts = self.decoded([rollouts.prompts[0]], responses)
        write_rollouts(self.run_folder / "continuations.jsonl", [
            {"step": self.state.global_step, "row": row, "column": column, "response": text, "reward": reward}
            for (row, column), text, reward in zip(first, texts, rewards, strict=True) if row < self.keep_rollouts
        ])  # fmt: skip

    # SPO-tree.

    def tree_rollouts(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """A rollout function of TRL: the rows of a prompt are the segments of a tree; in evaluation, responses."""
        ids = self._tokenize_prompts(prompts)[0]
        tree = self.sampling.tree
        if tree is None or not self.model.training:
            tokens, logprobs = self._generate_single_turn(ids, None, {}, self._group_size)
            return {"prompt_ids": ids, "completion_ids": tokens, "logprobs": logprobs}
        roots = ids[:: self.num_generations]
        trees: list[list[Node]] = [[] for _ in roots]
        frontier: list[tuple[int, int, list[int]]] = [(number, 0, []) for number in range(len(roots))]
        for level, width in enumerate(tree.branching, 1):
            asked = [place for place in frontier for _ in range(width)]
            room = [self.max_completion_length - len(before) for _, _, before in asked]
            limits = room if level == len(tree.branching) else [min(tree.segment, r) for r in room]
            found, _ = self.continued([roots[number] + before for number, _, before in asked], limits)
            frontier = []
            for (number, parent, before), tokens, left in zip(asked, found, room, strict=True):
                node = Node(parent, before, tokens, tokens[-1] in self.eos_token_ids)
                trees[number].append(node)
                if not node.ended and len(tokens) < left:
                    frontier.append((number, len(trees[number]), node.response))
        parts = [
            tree_rows(root, nodes, self.num_generations, self.eos_token_ids[0])
            for root, nodes in zip(roots, trees, strict=True)
        ]
        out: dict[str, Any] = {name: [x for part in parts for x in part[name]] for name in parts[0]}
        leaves = sum(column["leaf"] for column in out["spo_tree"])
        self._budget(
            segments=sum(map(len, trees)), responses=leaves, tokens=sum(len(n.tokens) for t in trees for n in t)
        )
        return {**out, "logprobs": None}

    def tree_judged(self, found: Tensor, columns: Sequence[Mapping[str, Any]]) -> Tensor:
        """(N, functions) rewards of all processes, NaN but for leaves; `columns`: those of this process's rows."""
        device, unfinished = found.device, self.sampling.tree.unfinished if self.sampling.tree else None
        leaf = gathered(self.accelerator, torch.tensor([c["leaf"] for c in columns], device=device))
        ended = gathered(self.accelerator, torch.tensor([c["ended"] for c in columns], device=device))
        if unfinished is not None:
            found = torch.where(ended.unsqueeze(-1) | torch.isnan(found), found, unfinished)
        return torch.where(leaf.unsqueeze(-1), found, torch.nan)

    # DAPO's dynamic sampling.

    def resampled(self, attempts: int, inputs: Sequence[Row]) -> tuple[list[dict[str, Any]], dict[str, Any], Tensor]:
        """(rows, what a rollout function returns, rewards of all processes' rows) after groups with equal rewards got
        other prompts of the data, at most `attempts` times. Those that are left stay as they are."""
        rows, n = [dict(row) for row in inputs], len(inputs)
        prompts = [row["prompt"] for row in rows]
        ids = list(self._tokenize_prompts(prompts)[0])
        tokens, logprobs = self._generate_single_turn(ids, None, {}, self.num_generations)
        rewards = self.judged(rows, tokens, rows[0])
        first, sampled, attempt = self.accelerator.process_index * n, n, 0
        while True:
            everywhere = gathered(self.accelerator, rewards)
            dull = self.dull_groups(everywhere)
            if not dull or attempt == attempts:
                break
            attempt += 1
            fresh = dict(zip(dull, self._other_rows(len(dull), attempt), strict=True))
            mine = [i for i in range(n) if (first + i) // self.num_generations in fresh]
            for i in mine:
                rows[i] = dict(fresh[(first + i) // self.num_generations])
            asked = self._tokenize_prompts([rows[i]["prompt"] for i in mine])[0] if mine else []
            found, scores = self.continued(asked, [self.max_completion_length] * len(mine))
            judged = self.judged([rows[i] for i in mine], found, rows[0])
            for place, i in enumerate(mine):
                ids[i], tokens[i], rewards[i] = asked[place], found[place], judged[place]
                if logprobs is not None and scores is not None:
                    logprobs[i] = scores[place]
            sampled += len(mine)
        self._budget(responses=sampled)
        for name, value in (("attempts", attempt), ("dull_groups", len(dull))):
            self._metrics["train"][f"sampling/{name}"].append(float(value))
        return rows, {"prompt_ids": ids, "completion_ids": tokens, "logprobs": logprobs}, everywhere

    def dull_groups(self, of_functions: Tensor) -> list[int]:
        """Groups of which `dynamic_sampling` keeps no row."""
        rewards = self.weighted(of_functions)
        group = torch.arange(len(rewards), device=rewards.device) // self.num_generations
        kept = dynamic_sampling(rewards, group, torch.ones(len(rewards), 1, dtype=torch.bool, device=rewards.device))
        return [g for g in range(len(rewards) // self.num_generations) if not bool(kept[group == g].any())]

    def _other_rows(self, count: int, attempt: int) -> list[Row]:
        """Rows of the data, drawn alike in every process and again on resume."""
        generator = torch.Generator().manual_seed(self.args.seed + 1_000_003 * self._step + attempt)
        picks = torch.randint(len(self.train_dataset), (count,), generator=generator).tolist()
        if count <= len(self.train_dataset):
            picks = torch.randperm(len(self.train_dataset), generator=generator)[:count].tolist()
        return [self.train_dataset[pick] for pick in picks]
