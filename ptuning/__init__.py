"""Fine-tuning of all generations: P-tuning v2, LoRA and full tuning."""
