"""What a person reads: progress, summaries, and what an archive holds."""
