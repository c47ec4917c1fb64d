"""Training: supervised fine-tuning of the embedded model."""
