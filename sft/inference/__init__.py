"""Generation with a trained model: replies, prompt files, chat, exact match."""
