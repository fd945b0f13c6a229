"""Every adapter by slug, gathered from the files of each family."""

import adapters_pairs

ADAPTERS = {**adapters_pairs.ADAPTERS}
