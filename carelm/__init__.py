"""CareLM: fine-tuning chat assistants for customer care, health care and shops."""

__version__ = "0.1.0"
