"""Published KTO losses as candidates for the audit and contenders of the benchmark, where they need an adapter."""
