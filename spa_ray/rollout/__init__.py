"""From messages to prompt token ids, by one renderer that generation and training share."""
