"""Training and evaluation on Hugging Face Accelerate; start reading at trainer.py."""
