"""Why post-training of vision-language models improves reasoning more than perception, and two cures, at any scale."""
