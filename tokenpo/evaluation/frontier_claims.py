"""What the papers say of their losses, in one clause each, and with what it is to be compared here."""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    """`text`, the paper's claim in its own quantities; here: is `what` at equal KL `expected` than that of `against`?

    `expected` None: the claim is of something this benchmark cannot show, and the comparison stands for itself.
    """

    text: str
    against: str = "dpo"
    what: str = "reward"
    expected: str | None = "higher"


CLAIMS: dict[str, tuple[Claim, ...]] = {
    "tdpo1": (
        Claim("a better reward–KL frontier than DPO (IMDb, GPT-2 large)"),
        Claim("keeps more generation entropy than DPO (HH, Pythia 2.8B: 4.9 against 3.2 nats)", what="entropy"),
    ),
    "tdpo2": (
        Claim("a better reward–KL frontier than DPO (IMDb, GPT-2 large)"),
        Claim("keeps more generation entropy than DPO (HH, Pythia 2.8B: 4.9 against 3.2 nats)", what="entropy"),
        Claim("the stop-gradient on the chosen side improves on TDPO1", against="tdpo1"),
    ),
    "tgdpo": (Claim("higher win rates than DPO and SimPO; stays good where DPO is trained to convergence"),),
    "sparsepo": (
        Claim("a better reward–KL frontier on sentiment than DPO and TDPO"),
        Claim("a better reward–KL frontier on sentiment than DPO and TDPO", against="tdpo1"),
    ),
    "sparsepo_common": (Claim("as SparsePO, one mask for both terms"),),
    "sparsepo+mapo": (Claim("as SparsePO, with weights read off the reference's activations"),),
    "critical_dpo": (Claim("higher accuracy in mathematics than DPO"),),
    "critical_dpo_per_position": (Claim("the authors' released loss, likely that of their numbers"),),
    "t_reg": (Claim("higher win rates than DPO (AlpacaEval 2: +3.8)"),),
    "t_reg_static": (Claim("weighting every pair alike is worse than by the margin", "t_reg", expected="lower"),),
    "t_reg_simpo": (Claim("higher win rates than SimPO (AlpacaEval 2: +1.0)", against="simpo"),),
    "bmc": (Claim("higher win rates than DPO (AlpacaEval 2: +5.7 to +6.4), most of it from edited pairs"),),
    "bmc_own_weights": (Claim("the authors' released loss, behind their numbers"),),
    "bmc_ipo": (Claim("the same weights improve IPO", against="ipo"),),
    "ra_dpo1": (Claim("more reward and less sequential KL than TDPO", against="tdpo1"),),
    "ra_dpo2": (Claim("more reward and less sequential KL than TDPO", against="tdpo2"),),
    "aligndistil": (
        Claim("higher win rates than DPO (AlpacaEval 2: +6) and TDPO"),
        Claim("one strength for all tokens drifts further for less", against="aligndistil_constant"),
    ),
    "aligndistil_constant": (
        Claim("a contrast of DPO with reverse DPO beats extrapolating DPO alone", against="aligndistil_theorem1"),
    ),
    "aligndistil_theorem1": (Claim("equals RLHF with DPO's token reward; no claim against DPO", expected=None),),
    "ipo": (Claim("does not over-fit where preferences are near certain, as DPO does"),),
    "ipo_sum": (Claim("as IPO, sums as printed instead of means"),),
    "simpo": (Claim("higher win rates than DPO, without a reference"),),
    "orpo": (Claim("matches or beats DPO without a reference or a supervised phase"),),
    "orpo_with_prompt": (Claim("ORPO as TRL trains it; no claim against ORPO", against="orpo", expected=None),),
    "kto": (Claim("matches or beats DPO from single labelled responses"),),
    "apo_zero_unpaired": (Claim("KTO without its reference point; no claim against KTO", "kto", expected=None),),
    "hinge": (Claim("about as good as the logistic link", expected=None),),
    "robust_dpo": (Claim("better than DPO where labels are flipped; here none are", expected=None),),
    "ld_dpo": (Claim("shorter answers; here all have one length, so it is DPO (checks the harness)", expected=None),),
    "dpo_norm": (Claim("DPO on means; here all have one length, so it is DPO (checks the harness)", expected=None),),
    "mapl_intra": (Claim("follows several instructions better; teaches which prompt is answered", expected=None),),
    "meet": (Claim("better than DPO on part of the settings"),),
    "sft": (Claim("the baseline that preference losses are to beat", expected="lower"),),
}


def found_of(claim: Claim, verdict: str) -> str:
    """The claim "shown", "opposite shown" or "not shown"; the verdict itself where nothing is claimed or comparable."""
    if claim.expected is None or verdict in ("mixed", "not reached"):
        return verdict
    if verdict == "no difference shown":
        return "not shown"
    return "shown" if verdict == claim.expected else "opposite shown"
