"""From the configuration of `tokenpo train` or `tokenpo rl` to what `tokenpo.training.planned_run` plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenpo import methods
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.loading import EMBEDDED
from tokenpo.commands.plan_inputs import adapter_options, dtype_of, load_config, reference_of
from tokenpo.commands.rl import composed
from tokenpo.commands.rl_config import RLConfig
from tokenpo.errors import InputError
from tokenpo.statistics.head import text_config
from tokenpo.training.engines import teachers_of
from tokenpo.training.plan import Peak, kv_cache_bytes, weight_bytes
from tokenpo.training.planned_model import four_bit_sizes, freeze_head, planned_model, stored_dtype
from tokenpo.training.planned_run import Online, Row, Run, flops_of, peak_of, standing
from tokenpo.training.planned_shards import Shards

PROMPT_TOKENS = 512
"""Of a prompt of online training, which has no limit in its configuration."""
CONTEXT = 2**30
"""Held on a card beside tensors: the driver's context, libraries and their workspaces, rounding to blocks of 2 MiB."""
VLLM_SHARE = 0.3
"""Of the card, TRL's default for vLLM in the same process."""


class Asked(NamedTuple):
    """What the planner was told beside the configuration: lengths in tokens, bytes of a card, how many cards."""

    prompt: int | None = None
    response: int | None = None
    memory: int | None = None
    devices: int = 1


@dataclasses.dataclass(frozen=True)
class Planned:
    """`peak(n)` of micro-batches of n; `batch` the one asked for, `step` what it has to be a multiple of; `flops` of a
    step and bytes `moved` to sample, at `batch`; `what` it counts and how long rows are, in words."""

    peak: Callable[[int], Peak]
    batch: int
    step: int
    flops: float
    moved: float
    what: str
    lengths: str


def planned(config: TrainConfig | RLConfig, asked: Asked) -> Planned:
    """What a configuration asks for."""
    return _online(config, asked) if isinstance(config, RLConfig) else _offline(config, asked)


def offline_run(config: TrainConfig, loss: methods.Method, devices: int = 1) -> Run:
    """What a run of `tokenpo train` is made of."""
    from tokenpo.commands.cache import given
    from tokenpo.commands.live import LIVE, MASKS

    read = teachers_of(loss).values()
    reads = any(n in loss.needs for n in ("ref_logps", "ref_kl", "policy_kl")) or bool(read)
    source = LIVE.get(str(config.credit.get("name")))
    networks = sum(n in loss.needs for n in MASKS) if source is not None and source.learns else 0
    return _run(
        config, config.trainer, devices=devices,
        outputs=("logps", *(n for n in ("entropy", "ref_kl", "policy_kl") if n in loss.needs)),
        reads=reads, give=given(config, loss)[1] if config.reference == "cache" else None,
        teachers=sum(name != "reference" for name in read), networks=networks,
    )  # fmt: skip


def _offline(config: TrainConfig, asked: Asked) -> Planned:
    from tokenpo.commands.train import check

    loss = check(config)
    prompt = asked.prompt or config.max_prompt_length or config.max_length // 2
    response = asked.response or config.max_length - prompt
    if prompt + response > config.max_length or response < 1:
        raise InputError(
            f"a prompt of {prompt} and a response of {response} tokens are more than max_length = {config.max_length}"
            if response > 0
            else f"a prompt of {prompt} tokens leaves none of max_length = {config.max_length} to a response"
        )
    run = offline_run(config, loss, asked.devices)
    whole = loss.kind == "pairwise_with_prompt"  # its chosen rows count their prompt as response
    own = loss.kind in ("prompt_pairs", "controlled_pairs")  # a prompt a side
    most = config.batch_size
    if config.tokens_per_batch is not None:
        most = max(1, min(most, config.tokens_per_batch // (2 * (prompt + response))))

    def rows(pairs: int) -> list[Row]:
        chosen = [Row(i, 1, prompt - 1 + response) if whole else Row(i, prompt, response) for i in range(pairs)]
        # rows of a batch are hardly ever of one length, and one of them shorter is enough for padding
        rejected = [
            Row(pairs + i if own or whole else i, prompt, max(1, response - (i == pairs - 1))) for i in range(pairs)
        ]
        return chosen + rejected

    return Planned(
        lambda pairs: peak_of(run, rows(pairs)), most, 1, flops_of(run, rows(most)), 0.0, "pair",
        f"prompts of {prompt} and responses of {response} tokens",
    )  # fmt: skip


def online_run(config: RLConfig, asked: Asked) -> tuple[Run, bool]:
    """What a run of `tokenpo rl` is made of, and whether statistics are read before the update."""
    from tokenpo.integrations.rollouts import STATISTICS

    composition, under = composed(config, asked.devices)
    needs, objective = composition.needs, under.needs
    reads = {"ref_logps", "ref_kl", "policy_kl"} & {*needs, *objective}
    # TRL's defaults where `tokenpo rl` sets none
    engine = bool(config.trainer.get("use_vllm")) and config.trainer.get("vllm_mode", "colocate") == "colocate"
    share = float(config.trainer.get("vllm_gpu_memory_utilization", VLLM_SHARE))
    held = int(share * (asked.memory or 0)) if engine else 0
    asleep = engine and bool(config.trainer.get("vllm_enable_sleep_mode"))
    run = _run(
        config, {"activation_checkpointing": config.model not in EMBEDDED, **config.trainer}, devices=asked.devices,
        outputs=("logps", "entropy", *(n for n in ("ref_logps", "ref_kl", "policy_kl") if n in objective)),
        reads=bool(reads), give=None, critic=config.critic,
        standing={"engine": 0 if asleep else held, "teachers": _judges(config)},
    )  # fmt: skip
    return run, any(n in STATISTICS for n in needs) or config.updates > 1


def _online(config: RLConfig, asked: Asked) -> Planned:
    run, scored = online_run(config, asked)
    prompt, response = asked.prompt or PROMPT_TOKENS, asked.response or config.max_new_tokens
    per = int(config.trainer.get("steps_per_generation") or config.accumulate)

    def rows(count: int) -> list[Row]:
        return [Row(i // config.group_size, prompt, max(1, response - (i == count - 1))) for i in range(count)]

    def online(count: int) -> Online:
        return Online(rows(count * per), not config.trainer.get("use_vllm"), scored, max(count, config.group_size))

    sampled = 0.0 if config.trainer.get("use_vllm") else _moved(run, config.batch_size * per, prompt, response)
    return Planned(
        lambda count: peak_of(run, rows(count), online(count)), config.batch_size, _step(config),
        flops_of(run, rows(config.batch_size)), sampled, "response",
        f"prompts of {prompt} and responses of {response} tokens",
    )  # fmt: skip


def _judges(config: RLConfig) -> int:
    """Bytes of the models that score rollouts: a reward model whose folder is there, the DPO model of a credit.

    One that has yet to be trained counts as the policy's own model, in the policy's bits.
    """
    names = [config.reward] if (Path(config.reward) / "config.json").is_file() else []
    if config.credit is not None and config.credit.get("dpo"):
        folder = Path(str(config.credit["dpo"]))
        names.append(str(folder) if folder.is_dir() else config.model)
    total = 0
    for name in names:
        held, adapter, bits = load_config(name)
        of_policy = name != config.reward and config.quantize is not None
        model = planned_model(held, dtype_of(config), quantize=config.quantize if of_policy else bits, lora=adapter)[0]
        total += sum(weight_bytes(model, four_bit_sizes(model)).values())
    return total


def _step(config: RLConfig) -> int:
    """The smallest micro-batch of whole groups, with as many micro-batches as there are."""
    return next(n for n in range(1, config.group_size + 1) if n * config.accumulate % config.group_size == 0)


def _moved(run: Run, rows: int, prompt: int, response: int) -> float:
    """Bytes read to sample a response: the weights, and half of the keys and values, for every token."""
    held = standing(run)
    weights = held["weights"] + held["adapters"] + held["quantisation state"]
    cache = kv_cache_bytes(text_config(run.model), rows, prompt + response, 2)
    return response * (weights + cache * (prompt + response / 2) / (prompt + response))


def _run(
    config: Any, trainer: Mapping[str, Any], *, outputs: tuple[str, ...], reads: bool, give: str | None,
    teachers: int = 0, networks: int = 0, critic: Mapping[str, Any] | None = None,
    standing: Mapping[str, int] | None = None, devices: int = 1,
) -> Run:  # fmt: skip
    _check_trainer(trainer)
    held_config, held_adapter, held_bits = load_config(config.model)
    quantize, lora = config.quantize or held_bits, adapter_options(config, held_adapter)
    if quantize is not None and lora is None:
        raise InputError(f"the weights of {config.model} are quantised and cannot train: give lora, a rank")
    if quantize is not None and devices > 1:
        raise InputError(
            f"devices {devices}: weights in four bits are not sharded, so each card needs what one needs (DDP): leave "
            "devices out"
        )
    checkpoints = trainer.get("activation_checkpointing", trainer.get("gradient_checkpointing", False))
    how = trainer.get("activation_checkpointing_kwargs", trainer.get("gradient_checkpointing_kwargs")) or {}
    autocast = torch.bfloat16 if trainer.get("bf16") else torch.float16 if trainer.get("fp16") else None
    dtype, shards = dtype_of(config) or stored_dtype(held_config), None
    if devices > 1:  # gathered in the narrower dtype at once, so nothing is left to cast
        stored, dtype, autocast = dtype, autocast or dtype, None
        shards = Shards(devices, stored.itemsize / dtype.itemsize)
    model, mode = planned_model(
        held_config, dtype, quantize=quantize, lora=lora, checkpointing=how if checkpoints else None
    )
    network = None
    if critic is not None:
        own: dict[str, Any] | None = {} if critic.get("activation_checkpointing") else None
        network = planned_model(held_config, torch.float32, checkpointing=own)
        freeze_head(network[0])
    reference = reference_of(config, reads, fresh=held_adapter is None, give=give)
    return Run(
        model, mode, optimiser=str(trainer.get("optim", "adamw_torch_fused")), autocast=autocast,
        checkpointing=bool(checkpoints), accumulate=config.accumulate, outputs=outputs, reference=reference,
        share=config.share_prompts is not False, networks=networks, teachers=teachers, critic=network,
        standing={**(standing or {}), "context": CONTEXT}, shards=shards,
    )  # fmt: skip


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    """A setting that is neither transformers' nor, where TRL is there, TRL's is named."""
    from transformers import TrainingArguments

    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    try:
        from trl import GRPOConfig
    except ImportError:
        return
    known |= {f.name for f in dataclasses.fields(GRPOConfig)}
    for key in trainer:
        if key not in known:
            raise InputError(f"trainer has no setting '{key}'{methods.nearest(key, known)}")
