"""Generation, chat, prompt files, exact match."""
