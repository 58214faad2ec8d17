"""Floor 3: training a network: data, module, schedules, callbacks."""
