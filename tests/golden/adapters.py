"""Every adapter by slug, gathered from the files of each family."""

import adapters_credit
import adapters_diagnostics
import adapters_offline_b
import adapters_pairs
import adapters_reward
import adapters_rlvr_a
import adapters_rlvr_b
import adapters_sparse

ADAPTERS = {
    **adapters_credit.ADAPTERS,
    **adapters_diagnostics.ADAPTERS,
    **adapters_offline_b.ADAPTERS,
    **adapters_pairs.ADAPTERS,
    **adapters_reward.ADAPTERS,
    **adapters_rlvr_a.ADAPTERS,
    **adapters_rlvr_b.ADAPTERS,
    **adapters_sparse.ADAPTERS,
}
