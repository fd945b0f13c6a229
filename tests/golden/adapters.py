"""Every adapter by slug, gathered from the files of each family."""

import adapters_credit
import adapters_offline_b
import adapters_pairs
import adapters_sparse

ADAPTERS = {
    **adapters_credit.ADAPTERS,
    **adapters_offline_b.ADAPTERS,
    **adapters_pairs.ADAPTERS,
    **adapters_sparse.ADAPTERS,
}
