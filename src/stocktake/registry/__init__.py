"""Registered versions: promotion, the gate, the model card."""
