"""Random schedules: processes that share a store, run one store operation at a time in an order that a seed decides."""
