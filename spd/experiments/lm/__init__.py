"""Language models: any Hugging Face model, on any text."""
