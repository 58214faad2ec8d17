"""Training a network: data, module, schedules, callbacks."""
